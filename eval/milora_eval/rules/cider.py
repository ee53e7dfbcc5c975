"""CIDEr-D of tokenized captions. Follows salaniz/pycocoevalcap cider/cider_scorer.py.

It uses n-grams of 1 to 4 words, sigma 6, and document frequencies from the references. A single picture scores 0,
because every inverse document frequency is log(1). The length of a caption is counted in bigrams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

SIGMA = 6.0
MAX_WORDS = 4
Ngrams = Counter[tuple[str, ...]]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the score of each caption against its references; ten is perfect. The corpus score is the mean.

    >>> [round(score, 6) for score in cider_d(["a cat sits", "a dog runs"], [["a cat sits"], ["a dog runs"]])]
    [7.5, 7.5]
    """
    reference_ngrams = [[ngrams(reference) for reference in group] for group in references]
    frequencies = Counter(gram for group in reference_ngrams for gram in set().union(*group))
    log_size = math.log(len(references)) if references else 0.0
    scores = []
    for caption, group in zip(captions, reference_ngrams, strict=True):
        weighted = _weigh(ngrams(caption), frequencies, log_size)
        similar = [_similarity(weighted, _weigh(grams, frequencies, log_size)) for grams in group]
        scores.append(10.0 * sum(similar) / len(similar))
    return scores


def ngrams(text: str) -> Ngrams:
    """Return the counts of all n-grams of 1 to 4 words."""
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_WORDS + 1) for i in range(len(words) - n + 1))


class _Weighted:
    """The tf-idf weights and their norms by n-gram length, and the number of bigrams."""

    def __init__(self) -> None:
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_WORDS)]
        self.norms = [0.0] * MAX_WORDS
        self.length = 0


def _weigh(grams: Ngrams, frequencies: Ngrams, log_size: float) -> _Weighted:
    weighted = _Weighted()
    for gram, count in grams.items():
        weight = count * (log_size - math.log(max(1, frequencies[gram])))
        weighted.weights[len(gram) - 1][gram] = weight
        weighted.norms[len(gram) - 1] += weight**2
        weighted.length += count * (len(gram) == 2)
    weighted.norms = [math.sqrt(norm) for norm in weighted.norms]
    return weighted


def _similarity(caption: _Weighted, reference: _Weighted) -> float:
    """Return the mean over n of the clipped cosines, reduced for captions of different length."""
    total = 0.0
    for n in range(MAX_WORDS):
        theirs = reference.weights[n]
        value = sum(
            min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in caption.weights[n].items()
        )
        if caption.norms[n] and reference.norms[n]:
            value /= caption.norms[n] * reference.norms[n]
        total += value
    return total / MAX_WORDS * math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
