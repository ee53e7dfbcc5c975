"""MMBench: parse the option of an answer by the rules of VLMEvalKit (without a judge).

Follows vlmeval/utils/matching_util.py and vlmeval/dataset/utils/multiple_choice.py (exact matching). Their switch
VERBOSE, which changes results, is off here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

Option = str | Literal[False]

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_ANSWER = "Failed to obtain answer via API"
_VERBOSE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def mmbench_option(text: str, choices: Mapping[str, str]) -> Option:
    """Return the letter of an answer by VLMEvalKit's rules, "Z" for a refusal, False if it is not clear.

    >>> mmbench_option("The answer is (B).", {"A": "red", "B": "green"})
    'B'
    """
    return option_letter(text, choices) or _option_by_text(text, choices)


def option_letter(text: str, letters: Iterable[str]) -> Option:
    """Return the letter named in an answer: alone among its last words, or after "answer is"."""
    letters = list(letters)
    if NO_ANSWER in text:
        return False
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = text.translate(_BLANKED).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    found = _VERBOSE.search(text)
    return found.group(1).upper() if found is not None and found.group(1).upper() in letters else False


def _option_by_text(text: str, choices: Mapping[str, str]) -> Option:
    """Return the only option whose text is in the answer; one more than twice as long as all options has none."""
    text = text.lower()
    if len(text) > 2 * sum(len(str(option)) for option in choices.values()):
        return False
    named = [letter for letter, option in choices.items() if str(option).lower() in text]
    return named[0] if len(named) == 1 else False
