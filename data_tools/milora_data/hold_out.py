"""Held-out records: which of them `convert --hold_out` takes.

No picture, question without a picture, or other chosen part of the data is on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from milora_data.formats.tables import field_of
from milora_data.records.record import Record, parse_record
from milora_vl.common.errors import DataError

PICTURE, RECORD = "picture", "record"


def held_out(records: Sequence[Mapping[str, Any]], count: int, by: str) -> frozenset[int]:
    """Return the indices of about `count` random records, always the same, without dividing a group.

    by: `record` (each record is a group), `picture` (records that share a picture or video, also through a third
    record; of records without any, those with an equal first question), or a key of the records (records with an equal
    value).

    Where each record is a group, the choice equals `train_test_split(count, seed=42)` of `datasets`. Raises `DataError`
    if no record would be left for training, or if a record lacks the key.

    >>> sorted(held_out([{"conversations": []}] * 10, 3, "record"))
    [0, 5, 6]
    """
    import numpy as np

    if count >= len(records):
        message = f"{count:,} of {len(records):,} records leave none for training"
        raise DataError(message, where="--hold_out", hint="hold out fewer records")
    if by == RECORD:
        groups = [[number] for number in range(len(records))]
    else:
        groups = _by_picture(records) if by == PICTURE else _equal(repr(field_of(value, by)) for value in records)
    if len(groups) == 1:
        message = (
            "shared pictures or questions link all records" if by == PICTURE else f"all records have the same {by}"
        )
        raise DataError(message, where="--hold_out_by", hint=f"use:  --hold_out_by {RECORD}")
    order = np.random.default_rng(42).permutation(len(groups)).tolist()
    sizes = [len(groups[number]) for number in order]
    return frozenset(index for place in _about(sizes, count) for index in groups[order[place]])


def shared_pictures(records: Sequence[Mapping[str, Any]], chosen: frozenset[int]) -> int:
    """Return how many of the `chosen` records show a picture or video that another record shows too."""
    others = {name for number, value in enumerate(records) if number not in chosen for name in _record(value).files}
    return sum(not others.isdisjoint(_record(records[number]).files) for number in chosen)


def _record(value: Mapping[str, Any]) -> Record:
    return parse_record(dict(value), embedded="keep")


def _equal(keys: Iterable[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _by_picture(records: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the connected components of records and what they show: pictures, or else the first question."""
    shown = [_shown(_record(value)) for value in records]
    group_of: dict[str, list[int]] = {}  # the group of a picture or question
    groups: dict[int, list[int]] = {}  # by their first record
    for number, names in enumerate(shown):
        found = {id(group_of[name]): group_of[name] for name in names if name in group_of}
        merged = max(found.values(), key=len, default=[])
        for group in found.values():
            if group is not merged:
                del groups[group[0]]
                for name in (name for member in group for name in shown[member]):
                    group_of[name] = merged
                merged += group
        merged.append(number)
        groups.setdefault(merged[0], merged)
        group_of.update(dict.fromkeys(names, merged))
    return list(groups.values())


def _shown(record: Record) -> tuple[str, ...]:
    """Return the pictures and videos of a record, or its first question; a file name contains no NUL."""
    return record.files or tuple(f"\0{turn.text}" for turn in record.turns if turn.role == "user")[:1]


def _about(sizes: Sequence[int], count: int) -> Iterator[int]:
    """Yield places of sizes whose sum is about `count`, or at most that; at least one is taken, and one is left."""
    total, left = 0, []
    for place, size in enumerate(sizes):
        if total + size <= count:
            total += size
            yield place
        else:
            left.append(place)
    smallest = min(left, key=sizes.__getitem__)
    if not total or (len(left) > 1 and total + sizes[smallest] - count < count - total):
        yield smallest
