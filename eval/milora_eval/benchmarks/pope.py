"""POPE: three sets of yes/no questions about the same pictures; the paper's number is the mean of their F1 scores.

Follows RUCAIBox/POPE evaluate.py and llava/eval/eval_pope.py, joined by id and never by position: LLaVA's script goes
wrong with the files of today, whose random set has 3,000 questions and not 2,910.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from milora_data.errors import UserError
from milora_eval.benchmark import Answer, Benchmark, Item, Metric, plain_text
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.benchmarks.submissions import write_rows
from milora_eval.data_files import find, read_jsonl
from milora_eval.rules.pope import PopeNumbers, pope_answer, pope_numbers
from milora_eval.stats import mean

SETS = ("random", "popular", "adversarial")
LLAVA_FILE = "llava_pope_test.jsonl"


class POPE(Benchmark):
    """The mean F1, and five numbers of each set."""

    name = "pope"
    split = "coco val2014"
    files = (
        *(f"coco_pope_{name}.json|coco/coco_pope_{name}.json|output/coco/coco_pope_{name}.json" for name in SETS),
        "val2014|images|.",
    )
    source = "github.com/RUCAIBox/POPE (output/coco) and cocodataset.org (val2014)"
    metric = "mean F1"

    def load(self, data_dir: Path) -> list[Item]:
        """Read the three sets; with LLaVA's question file its ids are known too."""
        pictures = find(self, data_dir, self.files[-1])
        own_ids = _llava_ids(data_dir)
        items: list[Item] = []
        for name, file in zip(SETS, self.files, strict=False):
            for entry in read_jsonl(find(self, data_dir, file)):
                known = own_ids.get((name, entry["image"], entry["text"]))
                item = picture_item(
                    len(items) if known is None else known,
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
        """Return 1.0 where the answer read as yes or no is the label."""
        return float((pope_answer(text) == "no") == (item.answers[0] == "no"))

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the mean F1, then F1, accuracy, precision, recall and the share of yes of each set."""
        texts: dict[str, list[str]] = defaultdict(list)
        labels: dict[str, list[str]] = defaultdict(list)
        for answer in answers:
            texts[answer.item.kind].append(pope_answer(answer.text))
            labels[answer.item.kind].append(answer.item.answers[0])
        numbers = {name: pope_numbers(texts[name], labels[name]) for name in sorted(texts, key=_place)}
        if not numbers:
            return []
        count = sum(map(len, texts.values()))
        missing = [name for name in SETS if name not in numbers]
        note = f"without {', '.join(missing)}" if missing else None
        headline = Metric(self.metric, mean([own.f1 for own in numbers.values()]), None, count, note=note)
        return [
            headline,
            *(metric for name, own in numbers.items() for metric in _metrics(name, own, len(texts[name]))),
        ]

    def llava_keys(self, item: Item) -> tuple[str, ...]:
        """Our own number of the question only where LLaVA's is known; its own id always."""
        return (str(item.meta["question_id"]), item.id) if item.meta.get("llava") else (item.id,)

    def llava_key(self, line: Mapping[str, Any]) -> str:
        """The id; a bare number means nothing without LLaVA's question file."""
        return str(line["question_id"])

    def submission(self, answers: list[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write one JSONL file a set, {question, answer}, in the order of the questions, for evaluate.py."""
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
                types = {"question_id": str, "question": str, "answer": str}
                files.append(write_rows(folder / f"coco_pope_{name}_answers.jsonl", rows, types, "question_id"))
        return files


def _metrics(name: str, own: PopeNumbers, count: int) -> list[Metric]:
    shown = {"F1": own.f1, "accuracy": own.accuracy}
    details = {"precision": own.precision, "recall": own.recall, "share of yes": own.yes_ratio}
    return [
        *(Metric(f"{name} {what}", value, None, count) for what, value in shown.items()),
        *(Metric(f"{name} {what}", value, None, count, detail=True) for what, value in details.items()),
    ]


def _place(name: str) -> int:
    return SETS.index(name)


def _llava_ids(data_dir: Path) -> dict[tuple[str, str, str], Any]:
    """Return LLaVA's question ids by set, picture and question; {} without its file."""
    path = data_dir / LLAVA_FILE
    if not path.is_file():
        return {}
    found: dict[tuple[str, str, str], Any] = {}
    for line in read_jsonl(path):
        key = (line["category"], line["image"], line["text"].removesuffix(SHORT))
        if key in found:
            raise UserError(f"{path}: the question {key} comes twice")
        found[key] = line["question_id"]
    return found
