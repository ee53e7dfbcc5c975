"""MATH as MiLoRA scores it: the answer behind the marker equals the reference as text, as a number or as a formula.

Follows sufenlp/MiLoRA inference/MATH_inference.py, util.py and grader.py, quirks included: a factor of 100 is forgiven,
and an answer or reference that the rewriting stumbles over ("x/2", two units) counts as right whatever the other says.
Formulas are read by sympy's parse_expr, as in the paper's environment (no LaTeX parser there): ^ is exclusive or.
It would execute a model's output: only a small alphabet reaches it, names mean symbols or a few functions, and after
ten seconds two formulas are not equal.
"""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from milora_eval.rules.gsm8k import MARKER, same_number
from milora_eval.rules.math_text import simplified

_BRACES = str.maketrans("", "", "{}()")
_NAMES = frozenset(("sqrt", "sin", "cos", "tan", "log", "ln", "exp", "pi", "E", "I", "factorial"))
_FORMULA = re.compile(r"[a-zA-Z\d\s+\-*/^().,!]{1,80}")
_SECONDS = 10.0
# Attributes; and, lest it costs the time above, the plainest numbers, factorials and powers that would take forever.
_RISKY = re.compile(r"\.\s*[a-zA-Z]|\d{20}|\d{4}\s*!|!\s*!|(\*\*|\^).*(\*\*|\^)|(\*\*|\^)[\s(\-]*\d{3}")


def math_correct(text: str, reference: str) -> bool:
    """Tell whether an answer equals the reference; always wrong without "The answer is: "."""
    parts = text.split(MARKER)
    if len(parts) < 2:
        return False
    answer = parts[-1].split(".\n")[0].strip().removesuffix(".").strip()
    return is_equivalent(answer, reference)


def is_equivalent(answer: str, reference: str) -> bool:
    """Tell whether two LaTeX answers are the same, by the script's rules."""
    try:
        own, true = simplified(answer), simplified(reference)
        return math_equal(own, true) or own == true
    except ValueError:
        # The script compares the answer with itself here: right, but for an empty one and for "nan".
        return math_equal(answer, answer) or answer == reference


def math_equal(answer: str, reference: str) -> bool:
    """Tell whether answers are equal as numbers (up to 1e-4 or a factor of 100), as text, in parts, or as formulas."""
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
    """Return a text without braces and, where the answer is a list of the reference's kind, without brackets."""
    answer = text if of is None else of
    as_list = answer.startswith("[") and answer.endswith("]") and not reference.startswith("(")
    as_tuple = answer.startswith("(") and answer.endswith(")") and not reference.startswith("[")
    return (text.strip("[]()") if as_list or as_tuple else text).translate(_BRACES)


def _equal_parts(answer: str, reference: str) -> bool:
    """Tell whether two lists or two tuples are equal part by part."""
    for left, right in ("[]", "()"):
        if all(text.startswith(left) and text.endswith(right) for text in (answer, reference)):
            own, true = answer[1:-1].split(","), reference[1:-1].split(",")
            return len(own) == len(true) and all(map(math_equal, own, true))
    return False


def _equal_formulas(answer: str, reference: str) -> bool:
    """Tell whether two formulas are equal after simplification, or as numbers up to 1e-3."""
    import sympy.parsing.sympy_parser  # noqa: F401 - not within the time limit, which would leave half of it

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
    """Return the sympy expression of a formula; None for what is none, and for what would not be safe to parse."""
    if not _FORMULA.fullmatch(text) or _RISKY.search(text):
        return None
    import sympy
    from sympy.parsing.sympy_parser import convert_xor, parse_expr, standard_transformations

    words = set(re.findall("[a-zA-Z]+", text)) - _NAMES
    if words & vars(sympy).keys():  # "2*beta": a function there, which cannot be multiplied
        return None
    symbols = {word: sympy.Symbol(word) for word in words}
    rules = (*standard_transformations, convert_xor) if xor_is_power else standard_transformations
    try:
        return parse_expr(text, local_dict=symbols, transformations=rules)
    except Exception:  # whatever the parser trips over, it is no formula
        return None


class _TooLong(BaseException):  # no Exception: sympy catches those
    pass


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TooLong after that time; in the main thread alone, which gets the signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
