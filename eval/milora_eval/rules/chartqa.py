"""ChartQA: relaxed correctness, five percent for numbers. Follows google-research/pix2struct metrics.py."""

from __future__ import annotations

MAX_RELATIVE_CHANGE = 0.05


def chartqa_correct(text: str, reference: str) -> bool:
    """Tell whether an answer is right: within 5 % of a number other than 0, else equal but for case; not stripped.

    >>> chartqa_correct("105", "100"), chartqa_correct("2018", "2019"), chartqa_correct("1,000", "1000")
    (True, True, False)
    """
    said, true = _number(text), _number(reference)
    if said is not None and true:  # 0 is falsy: it is compared as text
        return abs(said - true) / abs(true) <= MAX_RELATIVE_CHANGE
    return text.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
