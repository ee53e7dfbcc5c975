"""Rules for short free answers: equality after a light normalisation, ANLS, ChartQA's tolerance, PathVQA's words.

ANLS follows the RRC script (as in QwenLM/Qwen-VL, eval_mm/infographicsvqa_eval.py), ChartQA google-research/pix2struct
metrics.py, PathVQA UCSD-AI4H/PathVQA, Evaluation script/evaluation_script.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

ARTICLES = ("a ", "an ", "the ")
FIRST_LINE = "counts an accepted answer anywhere in the first line of the reply: ignores mere format errors"
THRESHOLD = 0.5
MAX_RELATIVE_CHANGE = 0.05


def normalise(text: str) -> str:
    """Return the normal form of an answer: lower-case, spaces collapsed, one trailing period and one article dropped.

    >>> normalise(" A  Red fox.")
    'red fox'
    """
    words = " ".join(text.lower().split()).removesuffix(".").rstrip()
    for article in ARTICLES:
        if words.startswith(article):
            return words.removeprefix(article)
    return words


def exact_match(text: str, accepted: Iterable[str]) -> bool:
    """Return whether `text` equals one of the accepted answers after `normalise`.

    >>> exact_match("Grey.", ["gray", "grey"])
    True
    """
    return normalise(text) in {normalise(answer) for answer in accepted}


def in_first_line(text: str, accepted: Iterable[str]) -> bool:
    """Return whether the first line of `text` mentions one of the accepted answers, as whole words.

    >>> in_first_line("It is a red fox.", ["the red fox"]), in_first_line("It is a foxtrot.", ["fox"])
    (True, False)
    """
    first = " ".join(text.strip().split("\n")[0].lower().split())
    words = filter(None, map(normalise, accepted))
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", first) for word in words)


def anls(text: str, references: Sequence[str]) -> float:
    """Return the similarity to the closest reference, 0 below 0.5.

    The distance ignores case and repeated spaces. The length that divides it does not: it is the length of the
    upper-case text, in which "ß" has the two letters of "SS".

    >>> anls("helo", ["hello"]), anls("ab  ", ["ax"])
    (0.8, 0.75)
    """
    distances = []
    for reference in references:
        length = max(len(text.upper()), len(reference.upper()))
        distance = levenshtein(" ".join(reference.lower().split()), " ".join(text.lower().split()))
        distances.append(distance / length if length else 0.0)
    similarity = 1 - min(distances)
    return 0.0 if similarity < THRESHOLD else similarity


def levenshtein(a: str, b: str) -> int:
    short, long = sorted((a, b), key=len)
    row = list(range(len(short) + 1))
    for i, letter in enumerate(long):
        above, row[0] = row[0], i + 1
        for j, other in enumerate(short):
            above, row[j + 1] = row[j + 1], above if letter == other else 1 + min(above, row[j + 1], row[j])
    return row[-1]


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


def pathvqa_exact_match(text: str, reference: str) -> float:
    """Return the number of different words of the reference that the answer has, over the number of its words.

    The script calls this exact match. Only letters and spaces count, so "T-cell" and "well\\nformed" are one word each.

    >>> pathvqa_exact_match("Yes.", "yes"), pathvqa_exact_match("the liver", "liver")
    (1.0, 0.5)
    """
    words = _words(text)
    return len(words.keys() & _words(reference).keys()) / words.total() if words else 0.0


def pathvqa_f1(text: str, reference: str) -> float:
    """Return the F1 of the words; a word that both have counts as often as the answer repeats it.

    >>> pathvqa_f1("the liver", "liver")
    0.6666666666666666
    """
    words, wanted = _words(text), _words(reference)
    hits = sum(count for word, count in words.items() if word in wanted)
    if not hits:
        return 0.0
    missed = sum(count for word, count in wanted.items() if word not in words)
    precision, recall = hits / words.total(), hits / (hits + missed)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> Counter[str]:
    return Counter(re.sub("[^a-zA-Z ]", "", text).lower().split())
