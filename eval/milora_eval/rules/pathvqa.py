"""PathVQA: exact match and F1 of the words. Follows UCSD-AI4H/PathVQA, Evaluation script/evaluation_script.py."""

from __future__ import annotations

import re
from collections import Counter


def pathvqa_exact_match(text: str, reference: str) -> float:
    """Return the number of different words of the reference that the answer has, over the number of its words.

    The script calls this exact match. Only letters and spaces count, so "T-cell" and "well\\nformed" are one word each.

    >>> pathvqa_exact_match("Yes.", "yes"), pathvqa_exact_match("the liver", "liver")
    (1.0, 0.5)
    """
    words = _words(text)
    return len(words.keys() & _words(reference).keys()) / words.total() if words else 0.0


def pathvqa_f1(text: str, reference: str) -> float:
    """Return the F1 of the words; a word that both have counts as often as the answer repeats it.

    >>> pathvqa_f1("the liver", "liver")
    0.6666666666666666
    """
    words, wanted = _words(text), _words(reference)
    hits = sum(count for word, count in words.items() if word in wanted)
    if not hits:
        return 0.0
    missed = sum(count for word, count in wanted.items() if word not in words)
    precision, recall = hits / words.total(), hits / (hits + missed)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> Counter[str]:
    return Counter(re.sub("[^a-zA-Z ]", "", text).lower().split())
