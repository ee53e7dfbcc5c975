"""MMStar: 1,500 multiple-choice questions that need the picture. The rule is the benchmark's own (protocol official).

The prompt follows lmms-eval (lmms_eval/tasks/mmstar): the question, which contains its options, and the request for a
letter without a period. Where the table has the options in columns, the prompt is the official script's for LLaVA. The
protocol lmms-eval takes the letter anywhere in an answer (tasks/_task_utils/mcq_extract.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora_eval.benchmark import Answer, Benchmark, Item, Metric, means
from milora_eval.benchmarks.llava_prompts import LETTER, asked_for_letter, choices_of, picture_item
from milora_eval.data_files import table_rows
from milora_eval.rules.multiple_choice import mcq_letter, mmstar_correct


class MMStar(Benchmark):
    """Accuracy over all questions and per core capability; the 18 axes are in results.json."""

    name = "mmstar"
    protocols = ("official", "lmms-eval")
    split = "val"
    max_new_tokens = 32
    files = ("mmstar.parquet|MMStar.tsv",)
    source = "huggingface.co/datasets/Lin-Chen/MMStar"

    def recognises(self, question: Any) -> bool:
        """Return whether a row has the two categories."""
        return {"category", "l2_category"} <= question.keys()

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions."""
        return [
            picture_item(
                row["index"],
                _prompt(row),
                row["picture"],
                answers=[row["answer"].strip()],
                kind=row["category"],
                meta={"l2_category": row["l2_category"]},
            )
            for row in table_rows(self, data_dir)
        ]

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 for the right letter."""
        if self.protocol == "lmms-eval":
            return float(mcq_letter(text, "ABCD") == item.answers[0].upper())
        return float(mmstar_correct(text, item.answers[0]))

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the accuracy: overall, per capability, and per axis as details."""
        answers = list(answers)
        axes = means(answers, self.metric, kind_of=lambda answer: answer.item.meta["l2_category"], detail=True)[1:]
        return [
            *means(answers, self.metric),
            *(replace(each, name=f"axis: {each.name}", mean_of=None) for each in axes),
        ]


def _prompt(row: dict[str, Any]) -> str:
    if choices := choices_of(row):
        return asked_for_letter(row["question"], choices)
    return row["question"].strip().replace(" Please answer yes or no.", "") + LETTER.removesuffix(".")
