"""POPE: parse yes or no from an answer, and compute the five numbers of a split.

Follows llava/eval/eval_pope.py (the rule of RUCAIBox/POPE evaluate.py); a number is 0 where the script divides by zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

YesNo = Literal["yes", "no"]


class PopeNumbers(NamedTuple):
    """The five numbers in the order of the script; `yes_ratio` is the share of yes among the answers."""

    f1: float
    accuracy: float
    precision: float
    recall: float
    yes_ratio: float


def pope_answer(text: str) -> YesNo:
    """Return "no" if a word of the first sentence is exactly No, not or no; else "yes".

    >>> pope_answer("No, there is none."), pope_answer("NO"), pope_answer("")
    ('no', 'yes', 'yes')
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_numbers(texts: Sequence[str], labels: Sequence[str]) -> PopeNumbers:
    """Return the numbers of one split; labels other than "no" count as yes."""
    pairs = [(pope_answer(text) == "yes", label != "no") for text, label in zip(texts, labels, strict=True)]
    true_yes = sum(said and true for said, true in pairs)
    said_yes, are_yes = sum(said for said, _ in pairs), sum(true for _, true in pairs)
    precision, recall = _ratio(true_yes, said_yes), _ratio(true_yes, are_yes)
    return PopeNumbers(
        f1=_ratio(2 * precision * recall, precision + recall),
        accuracy=_ratio(sum(said == true for said, true in pairs), len(pairs)),
        precision=precision,
        recall=recall,
        yes_ratio=_ratio(said_yes, len(pairs)),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
