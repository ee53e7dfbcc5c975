"""MMMU: parse the option of a multiple-choice answer and the parts of an open one. Follows mmmu/utils/eval_utils.py.

There is one difference: an answer without an option gets a random option, as in the script, but the choice depends only
on the item, not on the order of the items.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# As in the script, plus (?<!\d): no match starts inside a run of digits, and trying to takes quadratic time.
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_option(text: str, options: Mapping[str, str], *, seed: str = "") -> str:
    """Return the letter of an answer: "(B)", else a lone B, else an option's text in a long answer, else a random one.

    The last option in the text counts. `options` maps letters to texts; `seed` is the item's id.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for around in ("({})", " {} "):
        found = {letter: text.rfind(around.format(letter)) for letter in options if around.format(letter) in text}
        if found:
            return _last(found)
    if len(text.split()) > 5:
        lowered = text.lower()
        found = {
            letter: lowered.rfind(option.lower()) for letter, option in options.items() if option.lower() in lowered
        }
        if found:
            return _last(found)
    return random.Random(f"42 {seed}").choice(list(options))


def mmmu_open_correct(text: str, references: str | Sequence[str]) -> bool:
    """Return whether an open answer is right: a number in it equals a reference, or a part of it contains one."""
    golds = [references] if isinstance(references, str) else references
    right = [form for gold in golds for form in normal_forms(gold)]
    for part in open_parts(text):
        if isinstance(part, str):
            if any(isinstance(form, str) and form in part for form in right):
                return True
        elif part in right:
            return True
    return False


def open_parts(text: str) -> list[str | float]:
    """Return the normalised key phrases of an open answer and all numbers in them."""
    phrases = key_phrases(text)
    numbers = [number for phrase in phrases for pattern in NUMBERS for number in re.findall(pattern, phrase)]
    return list(dict.fromkeys(form for part in (*phrases, *numbers) for form in normal_forms(part)))


def key_phrases(text: str) -> list[str]:
    """Return per line the shortest tail after an indicator ("so", "is", ...; in the last also "="), else the text."""
    text = text.strip().strip(".").lower()
    # The look-ahead for a capital never matches, because the text is lower-case: only newlines split.
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    found = []
    for place, sentence in enumerate(sentences):
        indicators = (*INDICATORS, "=") if place == len(sentences) - 1 else INDICATORS
        tails = [sentence.split(indicator)[-1].strip() for indicator in indicators if indicator in sentence]
        shortest = _shortest(tails)
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found or [text]


def normal_forms(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, else the lower-case text; a letter gets a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _shortest(tails: Sequence[str]) -> str:
    """Return the first shortest tail; as in the script, the next tail replaces an empty one."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def _last(places: Mapping[str, int]) -> str:
    return max(places, key=lambda letter: places[letter])
