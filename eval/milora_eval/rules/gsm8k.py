"""GSM8K as MiLoRA scores it: the rounded number after the last "The answer is: ".

Follows sufenlp/MiLoRA inference/gsm8k_inference.py.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

MARKER = "The answer is: "
_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")


def gsm8k_number(text: str) -> int | None:
    """Return the first number after the last marker, with Python's rounding; None without a marker or number.

    Only one separator is parsed: "1,234,567" is 1234. A fraction is divided; with denominator 0 it is its numerator.

    >>> gsm8k_number("so. The answer is: 1/2"), gsm8k_number("The answer is 42")
    (0, None)
    """
    parts = text.split(MARKER)
    found = _NUMBER.search(parts[-1].strip()) if len(parts) > 1 else None
    if found is None:
        return None
    number = found.group().replace(",", "")
    if "/" in number:
        return _rounded_fraction(*number.split("/"))
    value = float(number)
    return None if abs(value) == float("inf") else round(value)


def gsm8k_correct(text: str, truth: int) -> bool:
    """Return whether the number is right within 1e-4 or a factor of 100, because the script also uses MATH's grader.

    >>> gsm8k_correct("The answer is: 1,800", 18), gsm8k_correct("The answer is: 19", 18)
    (True, False)
    """
    number = gsm8k_number(text)
    return number is not None and same_number(float(number), float(truth))


def same_number(value: float, truth: float) -> bool:
    """Return whether two numbers are equal up to 1e-4 or a factor of 100, like grader.py."""
    return any(math.isclose(own, value, rel_tol=1e-4) for own in (truth / 100, truth, truth * 100))


def _rounded_fraction(numerator: str, denominator: str) -> int | None:
    if not numerator.strip("+-"):
        return None
    if denominator == "0":
        value = float(numerator)
        return None if abs(value) == float("inf") else round(value)
    # Through Decimal, since int() refuses texts of more than 4,300 digits.
    if int(Decimal(denominator)) == 0:  # "1/00", which the script divides by
        return None
    fraction = Fraction(int(Decimal(numerator)), int(Decimal(denominator)))
    try:
        return round(fraction.numerator / fraction.denominator)
    except OverflowError:
        return None
