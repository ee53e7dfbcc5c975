"""CIDEr-D of captions that are tokenised already. Follows salaniz/pycocoevalcap cider/cider_scorer.py.

n-grams of 1 to 4 words, sigma 6, document frequencies from the references given. One picture alone scores 0, since
every inverse document frequency is log(1); a caption's length is counted in bigrams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

SIGMA = 6.0
MAX_WORDS = 4
Ngrams = Counter[tuple[str, ...]]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the score of every picture's caption against its references; ten is perfect. The corpus score is the mean.

    >>> [round(score, 6) for score in cider_d(["a cat sits", "a dog runs"], [["a cat sits"], ["a dog runs"]])]
    [7.5, 7.5]
    """
    cooked = [[ngrams(reference) for reference in group] for group in references]
    frequencies = Counter(gram for group in cooked for gram in set().union(*group))
    log_size = math.log(len(references)) if references else 0.0
    scores = []
    for caption, group in zip(captions, cooked, strict=True):
        own = _weigh(ngrams(caption), frequencies, log_size)
        similar = [_similarity(own, _weigh(grams, frequencies, log_size)) for grams in group]
        scores.append(10.0 * sum(similar) / len(similar))
    return scores


def ngrams(text: str) -> Ngrams:
    """Return how often each run of 1 to 4 words occurs."""
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_WORDS + 1) for i in range(len(words) - n + 1))


class _Weighted:
    """tf-idf weights and their norm by n-gram length, and the number of bigrams."""

    def __init__(self) -> None:
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_WORDS)]
        self.norms = [0.0] * MAX_WORDS
        self.length = 0


def _weigh(grams: Ngrams, frequencies: Ngrams, log_size: float) -> _Weighted:
    made = _Weighted()
    for gram, count in grams.items():
        weight = count * (log_size - math.log(max(1, frequencies[gram])))
        made.weights[len(gram) - 1][gram] = weight
        made.norms[len(gram) - 1] += weight**2
        made.length += count * (len(gram) == 2)
    made.norms = [math.sqrt(norm) for norm in made.norms]
    return made


def _similarity(own: _Weighted, other: _Weighted) -> float:
    """Return the mean over n of the clipped cosines, less for captions of different length."""
    total = 0.0
    for n in range(MAX_WORDS):
        theirs = other.weights[n]
        value = sum(
            min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in own.weights[n].items()
        )
        if own.norms[n] and other.norms[n]:
            value /= own.norms[n] * other.norms[n]
        total += value
    return total / MAX_WORDS * math.exp(-((own.length - other.length) ** 2) / (2 * SIGMA**2))
