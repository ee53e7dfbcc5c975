"""Leaks: which records of test data share questions or pictures with the training data."""

from __future__ import annotations

from collections.abc import Iterable

from milora_data.records.record import Record


def shared_with(train: Iterable[Record], test: Iterable[Record]) -> dict[str, int]:
    """Return how many records of `test` share questions or picture names with `train`."""
    questions: set[tuple[tuple[str, ...], str]] = set()
    names: set[str] = set()
    for record in train:
        names.update(record.images)
        questions.update((record.images, turn.text) for turn in record.turns if turn.role == "user")
    num_records = num_asked = num_named = 0
    for record in test:
        num_records += 1
        num_asked += any((record.images, turn.text) in questions for turn in record.turns if turn.role == "user")
        num_named += not names.isdisjoint(record.images)
    return {
        "test_records": num_records,
        "with_a_question_of_the_training": num_asked,
        "with_a_picture_name_of_the_training": num_named,
    }
