"""POPE: three sets of yes/no questions about the same pictures; the paper reports the mean of their F1 scores.

Follows RUCAIBox/POPE evaluate.py and llava/eval/eval_pope.py, but joins answers by id, never by position: LLaVA's
script gives wrong results for the current files, whose random set has 3,000 questions instead of 2,910.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from milora_eval.benchmark import Answer, Benchmark, Item, Metric, plain_text
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find, read_jsonl, write_rows
from milora_eval.rules.pope import PopeNumbers, pope_answer, pope_numbers
from milora_eval.stats import mean
from milora_vl.common.errors import UserError

SETS = ("random", "popular", "adversarial")
LLAVA_FILE = "llava_pope_test.jsonl"


class POPE(Benchmark):
    """The mean F1, and five numbers per set."""

    name = "pope"
    split = "coco val2014"
    files = (
        *(f"coco_pope_{name}.json|coco/coco_pope_{name}.json|output/coco/coco_pope_{name}.json" for name in SETS),
        "val2014|images|.",
    )
    source = "github.com/RUCAIBox/POPE (output/coco) and cocodataset.org (val2014)"
    metric = "mean F1"

    def load(self, data_dir: Path) -> list[Item]:
        """Read the three sets, and LLaVA's ids if its question file exists."""
        pictures = find(self, data_dir, self.files[-1])
        llava_ids = _llava_ids(data_dir)
        free = count(1 + max((number for number in llava_ids.values() if isinstance(number, int)), default=-1))
        items: list[Item] = []
        for name, file in zip(SETS, self.files, strict=False):
            for entry in read_jsonl(find(self, data_dir, file)):
                known = llava_ids.get((name, entry["image"], entry["text"]))
                item = picture_item(
                    next(free) if known is None else known,
                    entry["text"] + SHORT,
                    pictures / entry["image"],
                    name=f"{name}/{entry['question_id']}",
                    answers=[entry["label"]],
                    kind=name,
                    meta={} if known is None else {"llava": True},
                )
                items.append(item)
        return items

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 if the answer, read as yes or no, equals the label."""
        return float((pope_answer(text) == "no") == (item.answers[0] == "no"))

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the mean F1, then F1, accuracy, precision, recall and the share of yes of each set."""
        predicted: dict[str, list[str]] = defaultdict(list)
        labels: dict[str, list[str]] = defaultdict(list)
        groups: dict[str, list[str]] = defaultdict(list)
        for answer in answers:
            predicted[answer.item.kind].append(pope_answer(answer.text))
            labels[answer.item.kind].append(answer.item.answers[0])
            groups[answer.item.kind].append(answer.item.group)
        names = [name for name in SETS if name in predicted]
        if not names:
            return []
        numbers = {name: pope_numbers(predicted[name], labels[name]) for name in names}
        shares = {name: _influence(predicted[name], labels[name], groups[name], numbers[name].f1) for name in names}
        missing = [name for name in SETS if name not in numbers]
        headline = Metric(
            self.metric,
            mean([each.f1 for each in numbers.values()]),
            _stderr([shares[name] for name in names]),
            sum(map(len, predicted.values())),
            note=f"without {', '.join(missing)}" if missing else None,
        )
        sets = [_metrics(name, numbers[name], len(predicted[name]), _stderr([shares[name]])) for name in names]
        return [headline, *(metric for metrics in sets for metric in metrics)]

    def llava_keys(self, item: Item) -> tuple[str, ...]:
        """Return the item's id, and LLaVA's question number if it is known."""
        return (str(item.meta["question_id"]), item.id) if item.meta.get("llava") else (item.id,)

    def llava_key(self, line: Mapping[str, Any]) -> str:
        """Return the id of a line."""
        return str(line["question_id"])

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write one JSONL file per set, {question, answer}, in the order of the questions, for evaluate.py."""
        files = []
        for name in SETS:
            rows = [
                {
                    "question_id": a.item.id.split("/")[1],
                    "question": plain_text(a.item).removesuffix(SHORT),
                    "answer": a.text,
                }
                for a in answers
                if a.item.kind == name
            ]
            if rows:
                files.append(write_rows(folder / f"coco_pope_{name}_answers.jsonl", rows))
        return files


def _metrics(name: str, numbers: PopeNumbers, count: int, stderr: float | None) -> list[Metric]:
    details = {"precision": numbers.precision, "recall": numbers.recall, "share of yes": numbers.yes_ratio}
    return [
        Metric(f"{name} F1", numbers.f1, stderr, count),
        Metric(f"{name} accuracy", numbers.accuracy, None, count),
        *(Metric(f"{name} {what}", value, None, count, detail=True) for what, value in details.items()),
    ]


def _influence(predicted: list[str], labels: list[str], groups: list[str], f1: float) -> dict[str, float]:
    """Return the influence of each picture on F1 = 2 x true yes / (predicted yes + labelled yes), linearised."""
    total = sum(text == "yes" for text in predicted) + sum(label != "no" for label in labels)
    influence: dict[str, float] = defaultdict(float)
    for text, label, group in zip(predicted, labels, groups, strict=True):
        yes, true = text == "yes", label != "no"
        influence[group] += (2 * (yes and true) - f1 * (yes + true)) / total if total else 0.0
    return influence


def _stderr(sets: list[dict[str, float]]) -> float | None:
    """Return the standard error of the mean F1 of sets about the same pictures; None for a single picture."""
    groups = {group for influence in sets for group in influence}
    if len(groups) < 2:
        return None
    squares = math.fsum((sum(influence.get(group, 0.0) for influence in sets) / len(sets)) ** 2 for group in groups)
    return math.sqrt(squares * len(groups) / (len(groups) - 1))


def _llava_ids(data_dir: Path) -> dict[tuple[str, str, str], Any]:
    """Return LLaVA's question ids by (set, picture, question); {} if its file is missing."""
    path = data_dir / LLAVA_FILE
    if not path.is_file():
        return {}
    ids: dict[tuple[str, str, str], Any] = {}
    for line in read_jsonl(path):
        key = (line["category"], line["image"], line["text"].removesuffix(SHORT))
        if key in ids:
            raise UserError(
                f"the question {key} appears twice",
                code="benchmark-duplicate-id",
                where=str(path),
                hint="use the published file, unchanged",
            )
        ids[key] = line["question_id"]
    return ids
