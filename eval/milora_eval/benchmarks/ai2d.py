"""AI2D, test: diagrams of school books, multiple choice. Prompt and rule follow lmms-eval (lmms_eval/tasks/ai2d).

The protocol vlmevalkit reads the option as VLMEvalKit does without a judge. Its prompt for LLaVA is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_eval.benchmark import Benchmark, Item
from milora_eval.benchmarks.llava_prompts import LETTERS, asked_for_letter, choices_of, picture_item
from milora_eval.data_files import table_rows
from milora_eval.rules.mmbench import mmbench_option
from milora_eval.rules.multiple_choice import ai2d_correct


class AI2D(Benchmark):
    """The share of right letters."""

    name = "ai2d"
    protocols = ("lmms-eval", "vlmevalkit")
    max_new_tokens = 16
    files = ("data/test-*.parquet|test-*.parquet|AI2D_TEST.tsv",)
    source = "huggingface.co/datasets/lmms-lab/ai2d, or VLMEvalKit's AI2D_TEST.tsv (opencompass.openxlab.space)"

    def recognises(self, question: Any) -> bool:
        """Return whether a row has options and no category of another benchmark."""
        return bool(choices_of(question)) and "l2_category" not in question

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions; the hub counts the options from 0, VLMEvalKit names their letter."""
        return [
            picture_item(
                row.get("index", number),
                asked_for_letter(row["question"], choices_of(row)),
                row["picture"],
                answers=[LETTERS[int(row["answer"])] if "options" in row else row["answer"]],
                meta={"options": choices_of(row)},
            )
            for number, row in enumerate(table_rows(self, data_dir))
        ]

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 for the right letter."""
        if self.protocol == "vlmevalkit":
            return float(mmbench_option(text, item.meta["options"]) == item.answers[0])
        return float(ai2d_correct(text, item.answers[0]))
