"""Select items: nested subsets, and shards that keep the questions about one picture together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from milora_data.errors import UserError
from milora_eval.benchmark import Item


def select(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return at most `limit` items, in their order; a smaller limit gives a subset of a larger one.

    The order in which pictures are chosen depends on their names alone. A picture brings all its questions.
    """
    if limit is None or limit >= len(items):
        return list(items)
    kept = set(sorted(range(len(items)), key=lambda place: (_order(items[place].group), place))[:limit])
    return [item for place, item in enumerate(items) if place in kept]


def take_shard(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """Return the items of shard `number` (from 1) of `count`. Every item is in one shard; a shard may be empty."""
    number, count = shard
    groups = sorted({item.group for item in items}, key=_order)
    chosen = set(groups[number - 1 :: count])
    return [item for item in items if item.group in chosen]


def parse_shard(text: str) -> tuple[int, int]:
    """Return (number, count) of "2/4". Raises UserError for any other form.

    >>> parse_shard("2/4")
    (2, 4)
    """
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise UserError(
        f"expected i/n with i from 1 to n, got {text!r}",
        code="flag-value",
        where="--shard",
        hint="for example: --shard 1/4, --shard 2/4, ...",
    )


def _order(group: str) -> str:
    return hashlib.sha256(group.encode()).hexdigest()
