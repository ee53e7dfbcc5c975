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


def can_match(text: str, accepted: Iterable[str]) -> bool:
    """Return whether some continuation of `text` may be an `exact_match`; False only if none is.

    >>> can_match("the red", ["red fox"]), can_match("a", ["fox"]), can_match("The picture shows", ["red fox"])
    (True, True, False)
    """
    words = " ".join(text.lower().split())
    forms = [article + normalise(answer) for answer in accepted for article in ("", *ARTICLES)]
    return any(form.startswith(words) or words in (form + ".", form + " .") for form in forms)
