"""ChartQA: relaxed correctness, five percent for numbers. Follows google-research/pix2struct metrics.py."""

from __future__ import annotations

MAX_RELATIVE_CHANGE = 0.05


def chartqa_correct(text: str, reference: str) -> bool:
    """Return whether an answer is within 5 % of the reference (a number other than 0), else equal except for case.

    Spaces around the texts count.

    >>> chartqa_correct("105", "100"), chartqa_correct("2018", "2019"), chartqa_correct("1,000", "1000")
    (True, True, False)
    """
    predicted, true = _number(text), _number(reference)
    if predicted is not None and true:  # 0 is falsy: it is compared as text
        return abs(predicted - true) / abs(true) <= MAX_RELATIVE_CHANGE
    return text.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
