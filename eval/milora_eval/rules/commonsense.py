"""The text benchmarks of LLM-Adapters, which DoRA and MiLoRA report: the label, number or letter of an answer.

Follows AGI-Edgerunners/LLM-Adapters commonsense_evaluate.py and evaluate.py.
"""

from __future__ import annotations

import math
import re

_ANSWERS = "answer1|answer2|answer3|answer4|answer5"
LABELS = {
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    "social_i_qa": _ANSWERS,
    "ARC-Challenge": _ANSWERS,
    "ARC-Easy": _ANSWERS,
    "openbookqa": _ANSWERS,
    "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2",
}


def commonsense_label(text: str, dataset: str) -> str:
    """Return the first label in an answer, also inside other words; "" for none. KeyError for an unknown data set.

    >>> commonsense_label("the correct answer is untrue", "boolq")
    'true'
    """
    found = re.search(LABELS[dataset], text)
    return found.group() if found else ""


def last_number(text: str) -> float:
    """Return the last number of an answer, commas removed; infinity for none (GSM8K and its like)."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else math.inf


def first_letter(text: str) -> str:
    """Return the first capital A to E of an answer, in whatever word; "" for none (AQuA)."""
    found = re.search("[A-E]", text)
    return found.group() if found else ""
