"""RealWorldQA, test: photographs, most of them from cars. Prompt and rule follow lmms-eval (tasks/realworldqa).

The question itself asks for a letter, a word or a number, so nothing is added. VLMEvalKit's table has the options in
columns; they are asked as in its prompt for LLaVA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_eval.benchmark import Benchmark, Item
from milora_eval.benchmarks.llava_prompts import asked_for_letter, choices_of, picture_item
from milora_eval.data_files import table_rows
from milora_eval.rules.multiple_choice import realworldqa_correct


class RealWorldQA(Benchmark):
    """The share of right answers, then of letters and of other answers."""

    name = "realworldqa"
    protocols = ("lmms-eval",)
    max_new_tokens = 16
    files = ("data/test-*.parquet|test-*.parquet|RealWorldQA.tsv",)
    source = "huggingface.co/datasets/xai-org/RealworldQA, or VLMEvalKit's RealWorldQA.tsv (opencompass.openxlab.space)"

    def recognises(self, question: Any) -> bool:
        """Return whether a row asks for a direct answer, as all of the hub's files do, or has columns A, B."""
        return "Please answer directly" in question.get("question", "") or "A" in question

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions."""
        items = []
        for number, row in enumerate(table_rows(self, data_dir)):
            question, choices = row["question"].strip(), choices_of(row)
            items.append(
                picture_item(
                    row.get("index", number),
                    asked_for_letter(question, choices) if choices else question,
                    row["picture"],
                    answers=[row["answer"].strip()],
                    kind="letter" if row["answer"].strip() in tuple("ABCD") else "open",
                )
            )
        return items

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 for the right letter, word or number."""
        return float(realworldqa_correct(text, item.answers[0]))
