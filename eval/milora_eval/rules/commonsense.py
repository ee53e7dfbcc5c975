"""The commonsense benchmarks of LLM-Adapters, reported by DoRA and MiLoRA: parse the label of an answer.

Follows AGI-Edgerunners/LLM-Adapters commonsense_evaluate.py.
"""

from __future__ import annotations

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
    """Return the first label in an answer, also inside other words; "" without a match.

    Raises KeyError for an unknown data set.

    >>> commonsense_label("the correct answer is untrue", "boolq")
    'true'
    """
    match = re.search(LABELS[dataset], text)
    return match.group() if match else ""
