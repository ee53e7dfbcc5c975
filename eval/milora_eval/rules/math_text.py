"""MATH answers as text: the rewriting of LaTeX by which two spellings become one.

Follows MetaMath's util.py as in sufenlp/MiLoRA inference/util.py. A text it cannot rewrite raises ValueError there and
here; the scorer has its own rule for that.
"""

from __future__ import annotations

import re

_DROPPED = ("\n", "\\!")
_SIMPLER = (("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_SILENT = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")


def last_boxed(solution: str) -> str | None:
    """Return the content of the last \\boxed{...} (braces balanced), None without one.

    >>> last_boxed("so \\\\boxed{\\\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    start = max(solution.rfind("\\boxed"), -1)
    if start < 0 or not solution[start:].startswith("\\boxed{"):
        return None
    depth = 0
    for place in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[place], 0)
        if solution[place] == "}" and depth == 0:
            return solution[start + len("\\boxed{") : place]
    return None


def simplified(text: str) -> str:
    """Return an answer in the spelling that is compared. Raises ValueError for what the script stumbles over.

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
    first, *rest = text.split("\\sqrt")
    if not all(rest):
        raise ValueError("a root of nothing")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _braced_fractions(text: str) -> str:
    first, *rest = text.split("\\frac")
    made = first
    for part in rest:
        if not part:
            raise ValueError("a fraction of nothing")
        if part[0] == "{":
            made += f"\\frac{part}"
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            made += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            made += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return made


def _slash_to_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    a, b = int(parts[0]), int(parts[1])  # ValueError for anything but integers, as in the script
    return f"\\frac{{{a}}}{{{b}}}" if re.fullmatch(f"{a}/{b}", text) else text
