"""Select items: `--limit` (nested random subsets), `--shard`; questions about one picture stay together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from milora_eval.benchmark import Item
from milora_vl.base.errors import UserError

Orders = NDArray[np.uint64]
"""(items,): the `group_order` of each item."""


def group_order(group: str) -> int:
    """Return the place of a group (a picture) among all groups: 64 bits of a hash of its name."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def select(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return at most `limit` items, in their order; a smaller limit gives a subset of a larger one.

    The order in which pictures are chosen depends on their names alone. A picture brings all its questions.
    """
    orders = np.fromiter((group_order(item.group) for item in items), np.uint64, len(items))
    return [items[place] for place in selected(orders, limit).tolist()]


def selected(orders: Orders, limit: int | None) -> NDArray[np.int64]:
    """Return the places that `select` chooses, in ascending order."""
    if limit is None or limit >= len(orders):
        return np.arange(len(orders))
    return np.sort(np.argsort(orders, kind="stable")[:limit])


def shard_places(orders: Orders, shard: tuple[int, int]) -> NDArray[np.int64]:
    """Return the places of shard `number` (from 1) of `count`. Every item is in one shard; a shard may be empty."""
    number, count = shard
    return np.flatnonzero(np.isin(orders, np.unique(orders)[number - 1 :: count]))


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
