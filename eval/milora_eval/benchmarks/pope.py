"""POPE: three sets of yes/no questions about the same pictures; the paper reports the mean of their F1 scores.

Follows RUCAIBox/POPE evaluate.py and llava/eval/eval_pope.py, which joins answers by position: LLaVA's script gives
wrong results for the current files, whose random set has 3,000 questions instead of 2,910. A number is 0 where the
scripts divide by zero.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from milora_eval.benchmark import Answer, Benchmark, Item, Metric, grouped, write_rows
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find_all, json_values
from milora_eval.stats import mean

YesNo = Literal["yes", "no"]
SETS = ("random", "popular", "adversarial")


class POPE(Benchmark):
    name = "pope"
    split = "coco val2014"
    files = (
        *(f"coco_pope_{name}.json|coco/coco_pope_{name}.json|output/coco/coco_pope_{name}.json" for name in SETS),
        "val2014|images|.",
    )
    source = "github.com/RUCAIBox/POPE (output/coco) and cocodataset.org (val2014)"
    metric = "mean F1"

    def load(self, data_dir: Path) -> list[Item]:
        *sets, pictures = find_all(self, data_dir)
        items: list[Item] = []
        for name, path in zip(SETS, sets, strict=True):
            for entry in json_values(path):
                item = picture_item(
                    len(items),
                    entry["text"] + SHORT,
                    pictures / entry["image"],
                    name=f"{name}/{entry['question_id']}",
                    answers=[entry["label"]],
                    kind=name,
                )
                items.append(item)
        return items

    def score(self, item: Item, text: str) -> float:
        return float((pope_answer(text) == "no") == (item.answers[0] == "no"))

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        found = grouped(answers)
        sets = {name: found[name] for name in SETS if name in found}
        if not sets:
            return []
        texts = {name: [answer.text for answer in part] for name, part in sets.items()}
        labels = {name: [answer.item.answers[0] for answer in part] for name, part in sets.items()}
        numbers = {name: pope_numbers(texts[name], labels[name]) for name in sets}
        shares = {name: _influence(part, numbers[name].f1) for name, part in sets.items()}
        missing = [name for name in SETS if name not in sets]
        headline = Metric(
            self.metric,
            mean([each.f1 for each in numbers.values()]),
            _stderr(list(shares.values())),
            sum(map(len, sets.values())),
            note=f"without {', '.join(missing)}" if missing else None,
        )
        of_sets = [_metrics(name, numbers[name], len(part), _stderr([shares[name]])) for name, part in sets.items()]
        return [headline, *(metric for metrics in of_sets for metric in metrics)]

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write one JSONL file per set, {question, answer}, in the order of the questions, for evaluate.py."""
        files = []
        for name, part in grouped(answers).items():
            rows = [
                {
                    "question_id": answer.item.id.split("/")[1],
                    "question": answer.item.plain_text.removesuffix(SHORT),
                    "answer": answer.text,
                }
                for answer in part
            ]
            files.append(write_rows(folder / f"coco_pope_{name}_answers.jsonl", rows))
        return files


class PopeNumbers(NamedTuple):
    """The five numbers in the order of the script; `yes_ratio` is the share of yes among the answers."""

    f1: float
    accuracy: float
    precision: float
    recall: float
    yes_ratio: float


def pope_answer(text: str) -> YesNo:
    """Return "no" if a word of the first sentence is exactly No, not or no; else "yes".

    >>> pope_answer("No, there is none."), pope_answer("NO"), pope_answer("")
    ('no', 'yes', 'yes')
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_numbers(texts: Sequence[str], labels: Sequence[str]) -> PopeNumbers:
    """Return the numbers of one split; labels other than "no" count as yes."""
    pairs = [(pope_answer(text) == "yes", label != "no") for text, label in zip(texts, labels, strict=True)]
    true_yes = sum(said and true for said, true in pairs)
    said_yes, are_yes = sum(said for said, _ in pairs), sum(true for _, true in pairs)
    precision, recall = _ratio(true_yes, said_yes), _ratio(true_yes, are_yes)
    return PopeNumbers(
        f1=_ratio(2 * precision * recall, precision + recall),
        accuracy=_ratio(sum(said == true for said, true in pairs), len(pairs)),
        precision=precision,
        recall=recall,
        yes_ratio=_ratio(said_yes, len(pairs)),
    )


def _metrics(name: str, numbers: PopeNumbers, count: int, stderr: float | None) -> list[Metric]:
    details = {"precision": numbers.precision, "recall": numbers.recall, "share of yes": numbers.yes_ratio}
    return [
        Metric(f"{name} F1", numbers.f1, stderr, count),
        Metric(f"{name} accuracy", numbers.accuracy, None, count),
        *(Metric(f"{name} {what}", value, None, count, detail=True) for what, value in details.items()),
    ]


def _influence(answers: Sequence[Answer], f1: float) -> dict[str, float]:
    """Return the influence of each picture on F1 = 2 x true yes / (predicted yes + labelled yes), linearised."""
    pairs = [(pope_answer(each.text) == "yes", each.item.answers[0] != "no", each.item.group) for each in answers]
    total = sum(yes + true for yes, true, _ in pairs)
    influence: dict[str, float] = defaultdict(float)
    for yes, true, group in pairs:
        influence[group] += (2 * (yes and true) - f1 * (yes + true)) / total if total else 0.0
    return influence


def _stderr(sets: list[dict[str, float]]) -> float | None:
    """Return the standard error of the mean F1 of sets about the same pictures; None for a single picture."""
    groups = {group for influence in sets for group in influence}
    if len(groups) < 2:
        return None
    squares = math.fsum((sum(influence.get(group, 0.0) for influence in sets) / len(sets)) ** 2 for group in groups)
    return math.sqrt(squares * len(groups) / (len(groups) - 1))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
