"""ChartQA, test: relaxed accuracy (5 % tolerance for numbers) on the human and the augmented half, and their mean.

The files are the official ones, lmms-lab's of the hub (column `type`), or VLMEvalKit's table (column `split`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item, Metric
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find, is_table, table_rows
from milora_eval.rules.chartqa import chartqa_correct
from milora_eval.stats import stratified_mean, stratified_stderr

HALVES = ("human", "augmented")
TABLES = "data/test-*.parquet|test-*.parquet|ChartQA_TEST.tsv"


class ChartQA(Benchmark):
    """The mean of both halves, then each half."""

    name = "chartqa"
    files = (
        *(f"test/test_{half}.json|test_{half}.json|ChartQA Dataset/test/test_{half}.json|{TABLES}" for half in HALVES),
        f"test/png|png|ChartQA Dataset/test/png|{TABLES}",
    )
    source = "github.com/vis-nlp/ChartQA, or huggingface.co/datasets/lmms-lab/ChartQA"
    metric = "mean of halves"

    def recognises(self, question: Any) -> bool:
        """Return whether a question is one of the official files, or a row that names its half."""
        return isinstance(question, dict) and any(key in question for key in ("imgname", "type", "split"))

    def load(self, data_dir: Path) -> list[Item]:
        """Read both halves."""
        if is_table(find(self, data_dir, self.files[0])):
            return [_row_item(number, row) for number, row in enumerate(table_rows(self, data_dir))]
        pictures = find(self, data_dir, self.files[2])
        return [
            picture_item(
                f"{half}/{number}",
                entry["query"] + SHORT,
                pictures / entry["imgname"],
                answers=[entry["label"]],
                kind=half,
            )
            for half, file in zip(HALVES, self.files, strict=False)
            for number, entry in enumerate(read_json(find(self, data_dir, file)))
        ]

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 for an answer within the tolerance."""
        return float(chartqa_correct(text, item.answers[0]))

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the mean of both halves, then each half."""
        scored = [(a.value, a.item.kind, a.item.group) for a in answers if a.value is not None]
        if not scored:
            return []
        values, kinds, groups = [row[0] for row in scored], [row[1] for row in scored], [row[2] for row in scored]
        value, stderr = stratified_mean(values, kinds), stratified_stderr(values, kinds, groups)
        headline = Metric(self.metric, value, stderr, len(values), mean_of="types")
        halves = [_half(name, scored) for name in HALVES if name in kinds]
        return [headline, *halves]


def _row_item(number: int, row: dict[str, Any]) -> Item:
    half = "human" if "human" in (row["type"] if "type" in row else row["split"]) else "augmented"
    text = row["question"] + SHORT
    return picture_item(f"{half}/{number}", text, row["picture"], answers=[row["answer"]], kind=half)


def _half(name: str, scored: list[tuple[float, str, str]]) -> Metric:
    rows = [row for row in scored if row[1] == name]
    values, groups = [row[0] for row in rows], [row[2] for row in rows]
    metric = Metric(name, stratified_mean(values, [name] * len(rows)), None, len(rows), mean_of="items")
    return replace(metric, stderr=stratified_stderr(values, [name] * len(rows), groups))
