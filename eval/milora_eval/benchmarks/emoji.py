"""The emoji questions of `python -m milora_data emoji`: eight types, exact match, majority-answer baselines.

An answer is right if it equals an accepted one after `answers.normalise`: lower-case, spaces collapsed, one trailing
period and one leading article dropped. Only the last turn of a conversation is scored; the prompt contains the others.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora_data.emoji.questions import TYPES
from milora_eval.benchmark import Answer, Benchmark, Item, Metric, MissingData, means_of_types
from milora_eval.benchmarks.own_data import read_questions
from milora_eval.benchmarks.short_answers import FIRST_LINE, exact_match, in_first_line, normalise
from milora_eval.stats import mean

LENIENT = "mean, answer in first line"
LETTER = "choice_letter"
LETTER_NOTE = "small models rarely learn to answer with a letter: this type may stay at its baseline"


class EmojiBenchmark(Benchmark):
    """Held-out emoji: the mean over the question types (headline), accuracy by type, and a lenient mean."""

    name = "emoji"
    version = "1"
    protocols = ("exact match after normalisation",)
    split = "test"
    form = "training"
    max_new_tokens = 12  # the longest accepted answer has 7 tokens of SmolLM2; a longer reply is wrong anyway
    files = ("test.json", "images")

    def recognises(self, question: Any) -> bool:
        kind = question.get("type") if isinstance(question, dict) else None
        return kind in TYPES and "answers" in question and str(question.get("id")).startswith(f"{kind}-")

    def load(self, data_dir: Path) -> list[Item]:
        path = data_dir / "test.json"
        if not path.is_file():
            message, hint = "holds no emoji questions: no test.json", "create them: python -m milora_data emoji"
            hint = f"{hint} --output_dir {data_dir}"
            raise MissingData(f"{data_dir} {message}", code="eval-missing-files", hint=hint)
        items = read_questions(path, data_dir)
        items = [replace(item, kind=item.kind or "question", source="", meta={}) for item in items]
        baselines = _baselines(items)
        return [replace(item, baseline=baselines[item.id]) for item in items]

    def score(self, item: Item, text: str) -> float:
        return float(exact_match(text, item.answers))

    def mentions(self, item: Item, text: str) -> float | None:
        return None if item.kind == LETTER else float(in_first_line(text, item.answers))

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the mean over types, then each type, then how often a reply mentions an accepted answer."""
        answers = list(answers)
        metrics = means_of_types(answers, "mean over types")
        metrics = [replace(each, note=LETTER_NOTE) if each.name == LETTER else each for each in metrics]
        lenient = means_of_types(self.mentioned(answers), LENIENT)[:1]
        note = f"{FIRST_LINE}; without letters"
        return metrics + [replace(each, baseline=None, note=note, counts="mention") for each in lenient]


def _baselines(items: Sequence[Item]) -> dict[str, float]:
    """Return, per question, the score of the best strategy for its type and form that ignores the picture.

    The strategy is the most frequent answer among the test questions. For questions with options it is the best of
    this answer, always the same position, and guessing.
    """
    by_form: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        by_form[item.kind, _form(item)].append(item)
    baselines: dict[str, float] = {}
    for (_, form), part in by_form.items():
        candidates = _choosing(part) if form == "options" else []
        candidates.append(_majority(part))
        best = max(candidates, key=lambda values: math.fsum(values))
        baselines |= zip((item.id for item in part), best, strict=True)
    return baselines


def _form(item: Item) -> str:
    if {normalise(answer) for answer in item.answers} <= {"yes", "no"}:
        return "yes/no"
    return "options" if _options(item.question) else "open"


def _majority(items: Sequence[Item]) -> list[float]:
    counts = Counter(normalise(answer) for item in items for answer in set(item.answers))
    answer = min(counts, key=lambda word: (-counts[word], word))
    return [float(exact_match(answer, item.answers)) for item in items]


def _choosing(items: Sequence[Item]) -> list[list[float]]:
    """Return the scores of guessing, and of always choosing the first, the second, ... option."""
    right = [[float(exact_match(option, item.answers)) for option in _options(item.question)] for item in items]
    if not all(any(values) for values in right):
        return []
    guessing = [mean(values) for values in right]
    return [guessing, *([values[i] for values in right] for i in range(min(map(len, right))))]


def _options(question: str) -> list[str]:
    letters = re.findall(r"^([A-Z])\. ", question, flags=re.MULTILINE)
    if letters:
        return letters
    listed = re.search(r": (.+)\?", question)
    return re.split(r", | or ", listed.group(1)) if listed else []
