"""Normalisation of short free answers. Benchmarks with official rules have their own."""

from __future__ import annotations

from collections.abc import Iterable

ARTICLES = ("a ", "an ", "the ")


def normalise(text: str) -> str:
    """Return the normal form of an answer: lower-case, spaces collapsed, one trailing period and one article dropped.

    >>> normalise(" A  Red fox.")
    'red fox'
    """
    words = " ".join(text.lower().split()).removesuffix(".").rstrip()
    for article in ARTICLES:
        if words.startswith(article):
            return words.removeprefix(article)
    return words


def exact_match(text: str, accepted: Iterable[str]) -> bool:
    """Return whether `text` equals one of the accepted answers after `normalise`.

    >>> exact_match("Grey.", ["gray", "grey"])
    True
    """
    return normalise(text) in {normalise(answer) for answer in accepted}
