"""DocVQA and InfographicVQA: average normalised Levenshtein similarity (ANLS), computed as in the RRC script.

The files are the official ones, lmms-lab's of the hub, or VLMEvalKit's tables.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find, is_table, table_rows, write_rows
from milora_eval.rules.anls import anls


class DocVQA(Benchmark):
    """The val split of task 1."""

    name = "docvqa"
    split = "val"
    files: tuple[str, ...] = (
        "val_v1.0_withQT.json|val_v1.0.json|val/val_v1.0.json|DocVQA/validation-*.parquet|DocVQA_VAL.tsv",
        "documents|val/documents|DocVQA/validation-*.parquet|DocVQA_VAL.tsv",
    )
    source = "rrc.cvc.uab.es, Document Visual Question Answering, task 1, or huggingface.co/datasets/lmms-lab/DocVQA"
    metric = "ANLS"
    picture_key = "image"

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions."""
        path = find(self, data_dir, self.files[0])
        if is_table(path):
            return [_row_item(row) for row in table_rows(self, data_dir)]
        pictures = find(self, data_dir, self.files[1])
        return [
            picture_item(
                entry["questionId"],
                entry["question"] + SHORT,
                pictures / Path(entry[self.picture_key]).name,
                answers=entry.get("answers", ()),
            )
            for entry in read_json(path)["data"]
        ]

    def score(self, item: Item, text: str) -> float | None:
        """Return the similarity to the closest reference."""
        return anls(text, item.answers) if item.answers else None

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write [{questionId, answer}]."""
        rows = [{"questionId": a.item.meta["question_id"], "answer": a.text} for a in answers]
        return [write_rows(folder / f"{self.name}_{self.split}.json", rows)]


class InfoVQA(DocVQA):
    """The val split of task 3."""

    name = "infovqa"
    files = (
        "infographicsVQA_val_v1.0_withQT.json|infographicsVQA_val_v1.0.json|InfographicVQA/validation-*.parquet|InfoVQA_VAL.tsv",
        "infographicsvqa_images|infographicVQA_val_v1.0_images|images|InfographicVQA/validation-*.parquet|InfoVQA_VAL.tsv",
    )
    source = "rrc.cvc.uab.es, Document Visual Question Answering, task 3, or huggingface.co/datasets/lmms-lab/DocVQA"
    picture_key = "image_local_name"


def _row_item(row: dict[str, Any]) -> Item:
    """Return the question of a table; VLMEvalKit writes the list of answers as text."""
    answers = ast.literal_eval(row["answer"]) if "answer" in row else row["answers"] or ()
    name = int(row["index"] if "index" in row else row["questionId"])
    return picture_item(name, row["question"] + SHORT, row["picture"], answers=answers)
