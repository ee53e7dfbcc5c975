"""VQAv2 and VizWiz: the answer normaliser and the leave-one-annotator-out accuracy of their official scripts.

Follows GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, with its quirks: the look-behind of the
period rule has no effect, this rule stops after 32 periods, and nothing is normalised if all annotators agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
ARTICLES = frozenset(("a", "an", "the"))

# Each word also counts with one apostrophe omitted. The script's Im, Ive, Id've and I'dve are omitted: their capitals
# never match a lower-case text.
_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _WORDS for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the script has this pair in the wrong order

_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")
_MARKS = re.compile(f"[{re.escape(PUNCTUATION)}]")
_NUM_PERIODS = 32  # the script passes re.UNICODE (32) as the count


@lru_cache(maxsize=1 << 18)
def normalise(text: str) -> str:
    """Return the normal form of an answer by the official script: punctuation, periods, then words.

    >>> normalise("The t-shirt, two of them")
    't shirt 2 of them'
    """
    return normalise_words(strip_punctuation(text))


def strip_punctuation(text: str) -> str:
    """Delete a mark if it is next to a space anywhere, or if a number has a comma; else replace it by a space."""
    marks = set(_MARKS.findall(text))
    if marks:
        grouped = _COMMA.search(text) is not None
        table = {ord(m): "" if grouped or f"{m} " in text or f" {m}" in text else " " for m in marks}
        text = text.translate(table)
    return _PERIOD.sub("", text, count=_NUM_PERIODS)


def normalise_words(text: str) -> str:
    """Lower-case the text, convert number words to digits, drop articles, and restore apostrophes in contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def clean(text: str) -> str:
    """Return the stripped text with newlines and tabs replaced by spaces."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqav2_accuracy(text: str, references: Sequence[str]) -> float:
    """Return the accuracy of one answer, 0.0 to 1.0; both sides are normalised only if the references differ."""
    text, references = clean(text), [clean(reference) for reference in references]
    if len(set(references)) > 1:
        text, references = normalise(text), [normalise(reference) for reference in references]
    return leave_one_out(text, references)


def vizwiz_accuracy(text: str, references: Sequence[str]) -> float:
    """Return the accuracy of one answer by VizWiz' script, which normalises the answer but never the references."""
    return leave_one_out(normalise(clean(text)), [clean(reference) for reference in references])


def leave_one_out(text: str, references: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, matches among the others / 3)."""
    matches = sum(reference == text for reference in references)
    own, other = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * own + (len(references) - matches) * other) / len(references) if matches else 0.0
