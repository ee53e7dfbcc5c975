"""Stored answers for other programs: submissions for servers and official scripts, and LLaVA's files, read and written.

questions.jsonl {question_id, image, text, category}, answers.jsonl {question_id, prompt, text, answer_id, model_id,
metadata} as llava/eval/model_vqa_loader.py writes them (MMBench: also round_id). Joined by id, never by position.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.keys import digest
from milora_eval.answers.store import PREDICTIONS, read_lines, to_answer, write_lines
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.data_files import json_values, read_excel, read_table
from milora_eval.registry import folder_of, stored_benchmark
from milora_eval.scores.results import read_results
from milora_vl.common.errors import DataError, UserError

SUBMISSION = "submission"


def export(folder: Path) -> list[Path]:
    """Write submission/BENCHMARK/* for all benchmarks of a results folder that have a submission format.

    A run with --limit has no submission. A submission that cannot be written causes a warning, and the others are still
    written. Submissions of earlier answers are deleted.
    """
    results = read_results(folder)
    shutil.rmtree(folder / SUBMISSION, ignore_errors=True)
    if results.get("limit") is not None:
        return []
    data, model, written = Path(results.get("data") or "."), str(results.get("model", "")), []
    lines = read_lines(folder / PREDICTIONS)
    for entry in results.get("benchmarks", ()):
        benchmark = stored_benchmark(entry["reference"])
        answers = [to_answer(line) for line in lines if line["benchmark"] == entry["reference"]]
        target = folder / SUBMISSION / benchmark.name
        try:
            written += benchmark.submission(answers, target, folder_of(benchmark, data))
            if benchmark.form == "exact":
                written += write_llava_files(benchmark, answers, target, model)
        except UserError as error:
            sys.stderr.write(f"warning: no submission for {benchmark.name}: {error}\n")
    return written


def write_llava_files(benchmark: Benchmark, answers: Iterable[Answer], folder: Path, model: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    questions_file, answers_file = folder / "questions.jsonl", folder / "answers.jsonl"
    write_lines(questions_file, (benchmark.llava_question(answer.item) for answer in answers))
    write_lines(answers_file, (_answer_line(benchmark, answer, model) for answer in answers))
    return [questions_file, answers_file]


def _answer_line(benchmark: Benchmark, answer: Answer, model: str) -> dict[str, Any]:
    question = benchmark.llava_question(answer.item)
    row = {"question_id": question["question_id"], "prompt": question["text"], "text": answer.text}
    if "round" in answer.item.meta:
        row |= {"question_id": answer.item.meta["index"], "round_id": 0}
    return row | {"answer_id": digest([answer.item.id, answer.text]), "model_id": model, "metadata": {}}


def read_llava_answers(path: Path) -> list[Mapping[str, Any]]:
    """Return the lines of an answers file. Raises DataError if it has another format."""
    rows = list(json_values(path))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
            message = f'expected {{"question_id": ..., "prompt": ..., "text": ...}}, got {row!r:.80}'
            raise DataError(message, code="predictions-format", where=f"{path}:{number}")
    return rows


def read_predictions(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of VLMEvalKit's predictions (xlsx, tsv) as {question_id, text}.

    Raises DataError if a column is missing.
    """
    table = read_excel(path) if path.suffix == ".xlsx" else read_table(path).fillna("")
    if table.empty or not {"index", "prediction"} <= set(table.columns):
        columns = ", ".join(map(str, table.columns)) or "nothing"
        message = f"expected a table with the columns index and prediction, got: {columns}"
        raise DataError(message, code="predictions-format", where=str(path))
    pairs = zip(table["index"], table["prediction"], strict=True)
    return [{"question_id": index, "text": str(text)} for index, text in pairs if index != ""]


def join(benchmark: Benchmark, items: Sequence[Item], rows: Iterable[Mapping[str, Any]], path: Path) -> dict[str, str]:
    """Return the answer text of every item id; the order of the rows does not matter.

    Raises UserError for a missing id, a duplicate id, or an id that belongs to no question.
    """
    ids = {key: item.id for item in items for key in benchmark.llava_keys(item)}
    texts: dict[str, str] = {}
    for row in rows:
        try:
            key = benchmark.llava_key(row)
        except (KeyError, ValueError, TypeError):
            key = None
        if key not in ids:
            hint = f"check that the predictions and the data have the same split ({benchmark.name}: {benchmark.split})"
            if benchmark.name == "pope":
                hint = "LLaVA's answers use the ids of llava_pope_test.jsonl: put this file next to coco_pope_*.json"
            message = f"{benchmark.name} has no question {row['question_id']!r}"
            raise UserError(message, code="predictions-unknown-id", where=str(path), hint=hint)
        if ids[key] in texts:
            message, hint = f'two answers for the id "{ids[key]}"', "keep one answer for each id"
            raise UserError(message, code="predictions-duplicate-id", where=str(path), hint=hint)
        texts[ids[key]] = row["text"]
    missing = [item.id for item in items if item.id not in texts]
    if missing:
        listed = ", ".join(f'"{name}"' for name in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        message, hint = f"{len(missing)} of {len(items)} answers are missing", f"missing ids: {listed}{more}"
        raise UserError(message, code="predictions-missing-ids", where=str(path), hint=hint)
    return texts
