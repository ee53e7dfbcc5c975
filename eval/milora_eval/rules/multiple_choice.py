"""AI2D, MMStar, CUB-200 and RealWorldQA: is the letter of an answer right? Four scripts have four rules.

AI2D and RealWorldQA follow EvolvingLMMs-Lab/lmms-eval at 75571cf (tasks/ai2d/utils.py, tasks/realworldqa/utils.py and
tasks/_task_utils/mcq_extract.py). MMStar follows MMStar-Benchmark/MMStar (eval/vlmeval/evaluate/mmstar.py), CUB-200
jessemelpolio/LMM_CL (lmms-eval/lmms_eval/tasks/cub200/utils.py).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The forms in which `mcq_letter` finds a letter, and how much each counts.
_MARKED = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0
_PHRASES = (
    *(f"{what} is" for what in ("the answer", "answer", "the correct answer", "correct answer", "the best answer")),
    *(f"{what} is" for what in ("best answer", "the correct option", "correct option", "the best option")),
    *(f"{what} is" for what in ("best option", "the choice", "choice", "the correct choice", "correct choice")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is", "옵션", "정답은", "답은", "답:"),
    *("答案是", "答案为", "选", "答えは"),
)


def ai2d_correct(text: str, letter: str) -> bool:
    """Return whether an answer starts with the letter and a period, or is the letter alone.

    Case and punctuation do not count in a lone letter: "(b)" is right. "B) red" and "Option B" are wrong.

    >>> ai2d_correct("B. red", "B"), ai2d_correct("B red", "B")
    (True, False)
    """
    found = re.match(r"\s*([A-Z])\.", text)
    return (found.group(1) if found else text).strip().translate(_NO_PUNCTUATION).lower() == letter.lower()


def mmstar_correct(text: str, letter: str) -> bool:
    """Return whether an answer starts with the letter, with "(" or "option " or "the answer is " before it.

    What follows does not count: "Because of the sun" is B.

    >>> mmstar_correct("The answer is B", "B"), mmstar_correct("Answer: B", "B")
    (True, False)
    """
    text = text.lower().strip().replace("\n", " ")
    starts = ("", "(", "option ", "the answer is ")
    return any(text.startswith(start + letter.lower().strip()) for start in starts)


def cub200_correct(text: str, letter: str) -> bool:
    """Return whether the first letter that stands alone in an answer is the right one, else its first letter.

    "I choose B" names the letter I, and "A bird: B" the letter A.

    >>> cub200_correct("It is (b)", "B"), cub200_correct("I choose B", "B")
    (True, False)
    """
    text = text.strip()
    found = re.search(r"\b([A-Za-z])[.)]?\b", text)
    named = found.group(1) if found else text[:1] if text[:1].isalpha() else text
    return named.lower() == letter.lower()


def realworldqa_correct(text: str, answer: str) -> bool:
    """Return whether the letter of an answer (`mcq_letter`) is A to D, else whether its text equals the reference.

    >>> realworldqa_correct("The answer is B.", "B"), realworldqa_correct("Three.", "three")
    (True, True)
    """
    answer = answer.strip()
    if answer.upper() in ("A", "B", "C", "D"):
        return mcq_letter(text, "ABCD") == answer.upper()
    return text.lower().strip().rstrip(".") == answer.lower()


def mcq_letter(text: str, letters: Sequence[str]) -> str:
    """Return the capital letter that an answer names in the strongest form, the last one of that form; "" without one.

    After a phrase such as "the answer is", any of the letters counts, also inside a word.

    >>> mcq_letter("The answer is B.", "ABCD"), mcq_letter("The answer is B because A is wrong.", "ABCD")
    ('B', 'A')
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found: list[tuple[int, int, str]] = []  # strength, place, letter
    for form, strength in _MARKED:
        found += [(strength, text.rfind(form.format(each)), each) for each in letters if form.format(each) in text]
    for phrase in _PHRASES:
        start = text.lower().find(phrase)
        if start >= 0:
            places = {each: text.find(each, start + len(phrase)) for each in letters}
            found += [(_PHRASE, place, each) for each, place in places.items() if place >= 0]
    found += [(_START, 0, each) for each in letters if bare.startswith(each) and not bare[1:2].isalpha()]
    found += [(_END, len(text), each) for each in letters if bare.endswith(each) and not bare[-2:-1].isalpha()]
    found = found or [(_ANYWHERE, text.rfind(each), each) for each in letters if each in text]
    return max(found, key=lambda each: each[:2])[2] if found else ""
