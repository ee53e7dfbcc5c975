"""MME: parse yes, no or other from an answer, and compute the score of a subtask, 0 to 200.

Follows calculation.py of the benchmark's eval_tool.zip (BradyFU/Awesome-Multimodal-Large-Language-Models).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_answer(text: str) -> Literal["yes", "no", "other"]:
    """Return "yes", "no" or "other": the whole answer counts, else "yes", then "no", in its first four characters.

    >>> mme_answer("Yes, it is"), mme_answer("not sure"), mme_answer("y")
    ('yes', 'no', 'other')
    """
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def mme_score(texts: Sequence[str], labels: Sequence[str]) -> float:
    """Return 100 x accuracy + 100 x the share of pictures with both questions right; two adjacent lines are a picture.

    Raises ValueError for an odd number of lines.
    """
    right = [mme_answer(text) == label.lower() for text, label in zip(texts, labels, strict=True)]
    if len(right) % 2:
        raise ValueError(f"MME has two questions per picture, got {len(right)} answers")
    if not right:
        return 0.0
    both = sum(first and second for first, second in zip(right[::2], right[1::2], strict=True))
    return 100 * sum(right) / len(right) + 100 * both / (len(right) // 2)
