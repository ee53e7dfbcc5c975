"""`--hold_out N --hold_out_by PART`: which records go to eval.json, so that no part of the data is on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from milora_data.formats.vqa_files import field_of
from milora_data.records.record import parse_record
from milora_vl.common.errors import DataError

PICTURE, RECORD = "picture", "record"


def held_out(records: Sequence[Mapping[str, Any]], count: int, by: str) -> frozenset[int]:
    """Return the indices of about `count` random records, always the same, without dividing a group.

    by: `record` (each record is a group), `picture` (records that share a picture or video, also through a third
    record), or a key of the records (records with an equal value).

    Where each record is a group, the choice equals `train_test_split(count, seed=42)` of `datasets`. Raises `DataError`
    if no record would be left for training, or if a record lacks the key.

    >>> sorted(held_out([{"conversations": []}] * 10, 3, "record"))
    [0, 5, 6]
    """
    import numpy as np

    if count >= len(records):
        raise DataError(
            f"{count:,} of {len(records):,} records leave none for training",
            code="hold-out-too-large",
            where="--hold_out",
            hint="hold out fewer records",
        )
    groups = (
        {RECORD: _by_record, PICTURE: _by_picture}[by](records) if by in (RECORD, PICTURE) else _by_key(records, by)
    )
    if len(groups) == 1:
        raise DataError(
            "shared pictures link all records" if by == PICTURE else f"all records have the same {by}",
            code="hold-out-one-group",
            where="--hold_out_by",
            hint=f"use:  --hold_out_by {RECORD}",
        )
    order = np.random.default_rng(42).permutation(len(groups)).tolist()
    sizes = [len(groups[number]) for number in order]
    return frozenset(index for place in _about(sizes, count) for index in groups[order[place]])


def shared_pictures(records: Sequence[Mapping[str, Any]], chosen: frozenset[int]) -> int:
    """Return how many of the `chosen` records show a picture or video that another record shows too."""
    others = {name for number, value in enumerate(records) if number not in chosen for name in _files(value)}
    return sum(not others.isdisjoint(_files(records[number])) for number in chosen)


def _files(value: Mapping[str, Any]) -> tuple[str, ...]:
    return parse_record(dict(value), embedded="keep").files


def _by_record(records: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [[number] for number in range(len(records))]


def _by_picture(records: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the connected components of records and pictures."""
    group_of: dict[str, list[int]] = {}  # the group of a picture
    groups: dict[int, list[int]] = {}  # by their first record
    for number, value in enumerate(records):
        names = _files(value)
        found = {id(group_of[name]): group_of[name] for name in names if name in group_of}
        merged = max(found.values(), key=len, default=[])
        for group in found.values():
            if group is not merged:
                del groups[group[0]]
                for name in (name for member in group for name in _files(records[member])):
                    group_of[name] = merged
                merged += group
        merged.append(number)
        groups.setdefault(merged[0], merged)
        group_of.update(dict.fromkeys(names, merged))
    return list(groups.values())


def _by_key(records: Sequence[Mapping[str, Any]], key: str) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for number, value in enumerate(records):
        groups.setdefault(repr(field_of(value, key)), []).append(number)
    return list(groups.values())


def _about(sizes: Sequence[int], count: int) -> Iterator[int]:
    """Yield the places of sizes, in order, whose sum is at most `count`; then the smallest other one if that is closer.

    At least one place is taken, and one is left.
    """
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
