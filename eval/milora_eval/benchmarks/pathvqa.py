"""PathVQA, test: pathology. Exact match and F1 of words follow its script (UCSD-AI4H/PathVQA).

The prompt follows jessemelpolio/LMM_CL (arXiv:2510.08564; lmms-eval/lmms_eval/tasks/pathvqa). A question is yes/no
if its reference is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_plain_pickle
from milora_eval.benchmark import Answer, Benchmark, Item, Metric, means
from milora_eval.benchmarks.llava_prompts import picture_item
from milora_eval.data_files import find, is_table, table_rows
from milora_eval.rules.pathvqa import pathvqa_exact_match, pathvqa_f1

BEFORE = "Look at the medical image and answer the following question: "
AFTER = (
    "\nFor questions that can be answered with a yes or no, just answer yes or no. "
    "Otherwise, provide an answer in the medical domain."
)


class PathVQA(Benchmark):
    """Exact match, overall and of the two types of questions, then F1."""

    name = "pathvqa"
    max_new_tokens = 64
    files = (
        "qas/test/test_qa.pkl|pvqa/qas/test/test_qa.pkl|data/test-*.parquet|test-*.parquet",
        "images/test|pvqa/images/test|data/test-*.parquet|test-*.parquet",
    )
    source = "huggingface.co/datasets/flaviagiammarino/path-vqa, or github.com/UCSD-AI4H/PathVQA (qas and images)"
    metric = "exact match"

    def recognises(self, question: Any) -> bool:
        """Return whether a row is a question without options, unlike the other data sets with these file names."""
        return question.keys() == {"question", "answer"} and "directly" not in question["question"]

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions."""
        path = find(self, data_dir, self.files[0])
        if is_table(path):
            rows = table_rows(self, data_dir)
        else:
            pictures = find(self, data_dir, self.files[1])
            rows = [row | {"picture": pictures / f"{row['image']}.jpg"} for row in read_plain_pickle(path)]
        return [_item(number, row) for number, row in enumerate(rows)]

    def score(self, item: Item, text: str) -> float:
        """Return the exact match of the words."""
        return pathvqa_exact_match(text.strip(), item.answers[0])

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return exact match, overall and per type, and F1."""
        answers = list(answers)
        values = (replace(each, value=pathvqa_f1(each.text.strip(), each.item.answers[0])) for each in answers)
        return [*means(answers, self.metric), *(replace(each, mean_of=None) for each in means(values, "F1")[:1])]


def _item(number: int, row: dict[str, Any]) -> Item:
    kind = "yes/no" if row["answer"].strip().lower() in ("yes", "no") else "open"
    text = BEFORE + row["question"] + AFTER
    return picture_item(number, text, row["picture"], answers=[row["answer"]], kind=kind)
