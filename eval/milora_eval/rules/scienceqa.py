"""ScienceQA: parse the letter of an answer and its index among the choices. Follows llava/eval/eval_science_qa.py."""

from __future__ import annotations

import re

FAILED = "FAILED"
LETTERS = "ABCDE"


def scienceqa_letter(text: str) -> str:
    """Return the letter of an answer (a bare letter, "B. ...", or one "The answer is B" and a character), or FAILED.

    >>> scienceqa_letter("B"), scienceqa_letter("B. red"), scienceqa_letter("(B)")
    ('B', 'B', 'FAILED')
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return str(found[0]) if len(found) == 1 else FAILED


def scienceqa_index(text: str, num_choices: int) -> int:
    """Return the index of the choice that an answer names, -1 (wrong) if it names none."""
    letter = scienceqa_letter(text)
    return LETTERS.index(letter) if letter in list(LETTERS[:num_choices]) else -1
