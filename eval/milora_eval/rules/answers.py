"""Normalisation of short free answers. Benchmarks with official rules have their own."""

from __future__ import annotations

import re
from collections.abc import Iterable

ARTICLES = ("a ", "an ", "the ")
FIRST_LINE = "counts an accepted answer anywhere in the first line of the reply: ignores mere format errors"


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


def in_first_line(text: str, accepted: Iterable[str]) -> bool:
    """Return whether the first line of `text` mentions one of the accepted answers, as whole words.

    >>> in_first_line("It is a red fox.", ["the red fox"]), in_first_line("It is a foxtrot.", ["fox"])
    (True, False)
    """
    first = " ".join(text.strip().split("\n")[0].lower().split())
    words = filter(None, map(normalise, accepted))
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", first) for word in words)
