"""GSM8K and MATH as MiLoRA scores them: the answer follows "The answer is: ".

GSM8K follows sufenlp/MiLoRA inference/gsm8k_inference.py: the rounded number after the last marker.

MATH follows MATH_inference.py, util.py and grader.py, including their quirks: the answer equals the reference as text,
as a number or as a formula. A factor of 100 is accepted. An answer or reference that cannot be rewritten ("x/2", two
units) makes the answer right, for any text of the other. sympy's parse_expr parses the formulas, as in the paper's
environment (without a LaTeX parser), so ^ is exclusive or. parse_expr would execute the output of a model. Therefore
only a small alphabet reaches it, names mean symbols or a few functions, and two formulas that take more than ten
seconds are not equal.

Answers as text are rewritten as in MetaMath's util.py, which unifies spellings of LaTeX. A text that it cannot rewrite
raises ValueError, as in the script; the scorer has its own rule for this case.
"""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

MARKER = "The answer is: "
_GSM8K_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
_BRACES = str.maketrans("", "", "{}()")
_NAMES = frozenset(("sqrt", "sin", "cos", "tan", "log", "ln", "exp", "pi", "E", "I", "factorial"))
_FORMULA = re.compile(r"[a-zA-Z\d\s+\-*/^().,!]{1,80}")
_SECONDS = 10.0
# Attributes; also numbers, factorials and powers that would obviously exceed the time limit.
_RISKY = re.compile(r"\.\s*[a-zA-Z]|\d{20}|\d{4}\s*!|!\s*!|(\*\*|\^).*(\*\*|\^)|(\*\*|\^)[\s(\-]*\d{3}")


def gsm8k_number(text: str) -> int | None:
    """Return the first number after the last marker, with Python's rounding; None without a marker or number.

    Only one separator is parsed: "1,234,567" is 1234. A fraction is divided; with denominator 0 it is its numerator.

    >>> gsm8k_number("so. The answer is: 1/2"), gsm8k_number("The answer is 42")
    (0, None)
    """
    parts = text.split(MARKER)
    found = _GSM8K_NUMBER.search(parts[-1].strip()) if len(parts) > 1 else None
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


def math_correct(text: str, reference: str) -> bool:
    """Return whether an answer equals the reference; False without "The answer is: "."""
    parts = text.split(MARKER)
    if len(parts) < 2:
        return False
    answer = parts[-1].split(".\n")[0].strip().removesuffix(".").strip()
    return is_equivalent(answer, reference)


def is_equivalent(answer: str, reference: str) -> bool:
    try:
        own, true = simplified(answer), simplified(reference)
        return math_equal(own, true) or own == true
    except ValueError:
        # The script compares the answer with itself here: it is right, except an empty one and "nan".
        return math_equal(answer, answer) or answer == reference


def math_equal(answer: str, reference: str) -> bool:
    """Return whether answers are equal as numbers (within 1e-4 or a factor 100), as text, by parts, or as formulas."""
    own, true = _number(answer), _number(reference)
    if own is not None and true is not None:
        return same_number(own, true)
    if not answer:
        return False
    answer, reference = answer.strip(), reference.strip()
    return (
        _bare(answer, reference) == _bare(reference, reference, of=answer)
        or _equal_parts(answer, reference)
        or _equal_formulas(answer, reference)
    )


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _bare(text: str, reference: str, *, of: str | None = None) -> str:
    """Return a text without braces, and without brackets if the answer is a list of the same kind as the reference."""
    answer = text if of is None else of
    as_list = answer.startswith("[") and answer.endswith("]") and not reference.startswith("(")
    as_tuple = answer.startswith("(") and answer.endswith(")") and not reference.startswith("[")
    return (text.strip("[]()") if as_list or as_tuple else text).translate(_BRACES)


def _equal_parts(answer: str, reference: str) -> bool:
    for left, right in ("[]", "()"):
        if all(text.startswith(left) and text.endswith(right) for text in (answer, reference)):
            own, true = answer[1:-1].split(","), reference[1:-1].split(",")
            return len(own) == len(true) and all(map(math_equal, own, true))
    return False


def _equal_formulas(answer: str, reference: str) -> bool:
    """Return whether two formulas are equal after simplification, or as numbers up to 1e-3."""
    import sympy.parsing.sympy_parser  # noqa: F401 - the import takes half of the time limit, so the limit excludes it

    try:
        with _at_most(_SECONDS):
            return _equal_in_sympy(answer, reference)
    except _TooLong:
        return False


def _equal_in_sympy(answer: str, reference: str) -> bool:
    from sympy import N, simplify

    own, true = _parse(answer), _parse(reference)
    try:
        if own is not None and true is not None and simplify(own - true) == 0:
            return True
    except (TypeError, ValueError, AttributeError):
        pass
    own, true = (
        _parse(text, xor_is_power=True) if found is None else found
        for found, text in ((own, answer), (true, reference))
    )
    try:
        return own is not None and true is not None and math.isclose(N(own), N(true), rel_tol=1e-3)
    except (TypeError, ValueError, AttributeError):
        return False


def _parse(text: str, *, xor_is_power: bool = False) -> Any:
    """Return the sympy expression of a formula; None if the text is not a formula or not safe to parse."""
    if not _FORMULA.fullmatch(text) or _RISKY.search(text):
        return None
    import sympy
    from sympy.parsing.sympy_parser import convert_xor, parse_expr, standard_transformations

    words = set(re.findall("[a-zA-Z]+", text)) - _NAMES
    if words & vars(sympy).keys():  # "2*beta": beta is a function in sympy, which cannot be multiplied
        return None
    symbols = {word: sympy.Symbol(word) for word in words}
    rules = (*standard_transformations, convert_xor) if xor_is_power else standard_transformations
    try:
        return parse_expr(text, local_dict=symbols, transformations=rules)
    except Exception:  # any error of the parser means that the text is not a formula
        return None


class _TooLong(BaseException):  # not an Exception, because sympy catches those
    pass


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TooLong after this time; has no effect outside the main thread, which alone receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, because one in a callback of gc is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_DROPPED = ("\n", "\\!")
_SIMPLER = (("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_SILENT = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")


def last_boxed(solution: str) -> str | None:
    """Return the content of the last \\boxed{...} (with balanced braces), or None.

    >>> last_boxed("so \\\\boxed{\\\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    start = max(solution.rfind("\\boxed"), -1)
    if start < 0 or not solution[start:].startswith("\\boxed{"):
        return None
    depth = 0
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if solution[end] == "}" and depth == 0:
            return solution[start + len("\\boxed{") : end]
    return None


def simplified(text: str) -> str:
    """Return the normal form of an answer. Raises ValueError for texts that the script cannot rewrite.

    >>> simplified("1/2"), simplified("\\\\frac12"), simplified("x = 0.5")
    ('\\\\frac{1}{2}', '\\\\frac{1}{2}', '\\\\frac{1}{2}')
    """
    for word in _DROPPED:
        text = text.replace(word, "")
    for word, better in _SIMPLER:
        text = text.replace(word, better)
    for word in _SILENT:
        text = text.replace(word, "")
    text = _without_unit(text).replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = f"0{text}" if text[0] == "." else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _slash_to_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    parts = text.split("\\text{ ")
    if len(parts) > 2:
        raise ValueError("two units")
    return parts[0]


def _braced_roots(text: str) -> str:
    first, *parts = text.split("\\sqrt")
    if not all(parts):
        raise ValueError("a root without a radicand")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in parts)


def _braced_fractions(text: str) -> str:
    first, *parts = text.split("\\frac")
    result = first
    for part in parts:
        if not part:
            raise ValueError("a fraction without a numerator")
        if part[0] == "{":
            result += f"\\frac{part}"
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            result += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            result += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return result


def _slash_to_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    a, b = int(parts[0]), int(parts[1])  # raises ValueError except for integers, as in the script
    return f"\\frac{{{a}}}{{{b}}}" if re.fullmatch(f"{a}/{b}", text) else text
