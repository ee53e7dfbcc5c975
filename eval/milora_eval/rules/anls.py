"""DocVQA and InfographicVQA: average normalised Levenshtein similarity of one answer.

It follows the RRC script (as in QwenLM/Qwen-VL, eval_mm/infographicsvqa_eval.py).
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5


def anls(text: str, references: Sequence[str]) -> float:
    """Return the similarity to the closest reference, 0 below 0.5.

    The distance ignores case and repeated spaces. The length that divides it does not: it is the length of the
    upper-case text, in which "ß" has the two letters of "SS".

    >>> anls("helo", ["hello"]), anls("ab  ", ["ax"])
    (0.8, 0.75)
    """
    distances = []
    for reference in references:
        length = max(len(text.upper()), len(reference.upper()))
        distance = levenshtein(" ".join(reference.lower().split()), " ".join(text.lower().split()))
        distances.append(distance / length if length else 0.0)
    similarity = 1 - min(distances)
    return 0.0 if similarity < THRESHOLD else similarity


def levenshtein(a: str, b: str) -> int:
    """Return the smallest number of insertions, deletions and replacements that turn one text into the other."""
    short, long = sorted((a, b), key=len)
    row = list(range(len(short) + 1))
    for i, letter in enumerate(long):
        above, row[0] = row[0], i + 1
        for j, other in enumerate(short):
            above, row[j + 1] = row[j + 1], above if letter == other else 1 + min(above, row[j + 1], row[j])
    return row[-1]
