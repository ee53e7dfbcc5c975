"""MMMU, validation: college-level questions of 30 subjects, multiple-choice and open.

Prompts follow the benchmark's mmmu/configs/llava1.5.yaml and run_llava.py, which show only the first picture (their
check for options that are pictures iterates over the letters of a text and finds none). Scores follow
mmmu/utils/eval_utils.py. An empty line inside quotes of the yaml is one newline, so no empty line separates a question
from its options.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from milora_eval.benchmark import Answer, Benchmark, Item, Metric, means
from milora_eval.benchmarks.llava_prompts import LETTER, SHORT, picture_item
from milora_eval.data_files import find, unpack_picture
from milora_eval.rules.mmmu import mmmu_open_correct, mmmu_option
from milora_vl.common.atomic_write import write_json

LETTERS = "ABCDEFGHIJ"


class MMMU(Benchmark):
    """Accuracy over all questions (micro), and per subject as details."""

    name = "mmmu"
    split = "validation"
    files = ("Accounting/validation-00000-of-00001.parquet|validation-00000-of-00001.parquet",)
    source = "huggingface.co/datasets/MMMU/MMMU (a folder of parquet files per subject)"

    def load(self, data_dir: Path) -> list[Item]:
        """Read validation*.parquet of every subject and unpack the pictures into the user's cache."""
        import pyarrow.parquet as parquet

        files = sorted([*data_dir.glob("*/validation*.parquet"), *data_dir.glob("validation*.parquet")])
        if not files:
            find(self, data_dir, self.files[0])
        return [_item(row) for file in files for row in parquet.read_table(file).to_pylist()]

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 for the right option, or for an open answer that contains a reference."""
        if item.meta["options"]:
            return float(mmmu_option(text, item.meta["options"], seed=item.id) == item.answers[0])
        return float(mmmu_open_correct(text, item.answers))

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the accuracy, overall and per subject."""
        return means(answers, self.metric, detail=True)

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write {id: answer} for main_eval_only.py: letters for multiple choice, text for open questions."""
        rows = {
            a.item.id: mmmu_option(a.text, a.item.meta["options"], seed=a.item.id) if a.item.meta["options"] else a.text
            for a in answers
        }
        return [write_json(folder / "mmmu_validation.json", rows)]


def _item(row: dict[str, Any]) -> Item:
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else list(row["options"] or ())
    is_choice = row["question_type"] == "multiple-choice"
    lines = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    text = f"{row['question']}\n{lines}{LETTER}" if is_choice else f"{row['question']}{SHORT}"
    truth = row["answer"]
    if not is_choice and isinstance(truth, str) and truth.startswith("["):
        truth = ast.literal_eval(truth)
    return picture_item(
        row["id"],
        text,
        unpack_picture(row["image_1"]["bytes"], row["id"]),
        answers=truth if isinstance(truth, list) else [truth],
        kind=row["id"].removeprefix("validation_").rpartition("_")[0],
        meta={"options": dict(zip(LETTERS, options, strict=False)) if is_choice else {}},
    )
