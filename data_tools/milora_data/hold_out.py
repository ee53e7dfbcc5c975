"""Held-out records: which of them `convert --hold_out` takes, and what `check --against` finds on both sides.

Pictures and videos count by their content, and no order of the records changes the choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from milora_data.formats.tables import field_of
from milora_data.keys import KeyOf, digest, record_key, shown_keys
from milora_data.records import parse_record
from milora_data.records.record import IMAGE, Record
from milora_vl.common.errors import DataError

PICTURE, RECORD = "picture", "record"


def held_out(records: Sequence[Mapping[str, Any]], count: int, by: str, key_of: KeyOf) -> frozenset[int]:
    """Return the indices of about `count` random records, always the same, without dividing a group.

    by: `record` (equal records are a group), `picture` (records that share a picture or video, also through a third
    record; of records without any, those with an equal first question), or a key of the records (records with an equal
    value). Raises `DataError` if no record would be left for training, or if a record lacks the key.
    """
    if count >= len(records):
        message = f"{count:,} of {len(records):,} records leave none for training"
        raise DataError(message, where="--hold_out", hint="hold out fewer records")
    parsed = [parse_record(dict(value)) for value in records]
    keys = [record_key(record, key_of) for record in parsed]
    if by == RECORD:
        groups = _equal(keys)
    else:
        groups = _by_picture(parsed, key_of) if by == PICTURE else _equal(repr(field_of(row, by)) for row in records)
    if len(groups) == 1:
        same = {PICTURE: "shared pictures or questions link all records", RECORD: "all records are equal"}
        hint = "hold out other records" if by == RECORD else f"use:  --hold_out_by {RECORD}"
        raise DataError(same.get(by, f"all records have the same {by}"), where="--hold_out_by", hint=hint)
    groups.sort(key=lambda group: digest(sorted(keys[number] for number in group)))  # a random order, by content
    return frozenset(index for number in _about(list(map(len, groups)), count) for index in groups[number])


def leaks(
    train: Iterable[Record], test: Iterable[Record], of_train: KeyOf, of_test: KeyOf
) -> Iterator[tuple[Record, str]]:
    """Yield each record of `test` with a picture, video or whole question of `train`, and the first place of it."""
    seen: dict[str, str] = {}
    for record in train:
        seen.update(dict.fromkeys(_parts(record, of_train) - seen.keys(), record.place))
    for record in test:
        if shared := seen.keys() & _parts(record, of_test):
            yield record, seen[min(shared)]


def _parts(record: Record, key_of: KeyOf) -> set[str]:
    """Return the keys of the pictures and videos of a record, and of its questions with all that it shows."""
    texts = [turn.text.replace(IMAGE, "").strip() for turn in record.turns if turn.role == "user"]
    shown = shown_keys(record.images, record.videos, key_of)
    return {f"file {key_of(name)}" for name in record.files} | {f"question {digest([text, shown])}" for text in texts}


def _equal(keys: Iterable[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _by_picture(records: Iterable[Record], key_of: KeyOf) -> list[list[int]]:
    """Return the connected components of records and what they show: pictures, or else the first question."""
    shown = [_shown(record, key_of) for record in records]
    group_of: dict[str | None, list[int]] = {}  # the group of a picture or question
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


def _shown(record: Record, key_of: KeyOf) -> list[str | None]:
    """Return the keys of the pictures and videos of a record, or else its first question, which is no key."""
    asked = [f"\0{turn.text}" for turn in record.turns if turn.role == "user"][:1]
    return list(map(key_of, record.files)) or list(asked) or [record_key(record, key_of)]


def _about(sizes: Sequence[int], count: int) -> Iterator[int]:
    """Yield indices of sizes whose sum is about `count`, or at most that; at least one is taken, and one is left."""
    total, left = 0, []
    for index, size in enumerate(sizes):
        if total + size <= count:
            total += size
            yield index
        else:
            left.append(index)
    smallest = min(left, key=sizes.__getitem__)
    if not total or (len(left) > 1 and total + sizes[smallest] - count < count - total):
        yield smallest
