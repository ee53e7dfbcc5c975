"""The normalisation of short answers: lower-case, spaces, one period and one article; nothing else."""

from __future__ import annotations

import pytest

from milora_eval.benchmarks.short_answers import anls, exact_match, normalise


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Red", "red"),
        ("  a  Red\nFox. ", "red fox"),
        ("The end", "end"),
        ("an owl", "owl"),
        ("A", "a"),
        ("another", "another"),
        ("a the thing", "the thing"),
        ("red..", "red."),
        ("", ""),
        (".", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_an_answer_matches_any_accepted_one_and_nothing_near() -> None:
    assert exact_match("gray.", ["grey", "Gray"])
    assert not exact_match("red fox", ["fox"])
    assert not exact_match("yes, it is", ["yes"])
    assert not exact_match("", ["yes"])


def test_a_document_answer_that_is_less_than_half_right_is_wrong() -> None:
    assert anls("abcd", ["abxx"]) == 0.5
    assert anls("abcde", ["abxxx", "vwxyz"]) == 0


def test_the_length_of_a_document_answer_is_that_of_its_capitals() -> None:
    assert anls("Maß", ["Mas"]) == 0.75  # 1 of the 4 letters of MASS, as in the RRC script
