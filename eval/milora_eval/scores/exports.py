"""Stored answers for other programs: submissions for servers and official scripts, and LLaVA's files.

questions.jsonl {question_id, image, text, category}, answers.jsonl {question_id, prompt, text, answer_id, model_id,
metadata} as llava/eval/model_vqa_loader.py writes them (MMBench: also round_id).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from milora_data.keys import digest
from milora_eval.answers.store import PREDICTIONS, read_lines, to_answer, write_lines
from milora_eval.benchmark import Answer, Benchmark
from milora_eval.registry import folder_of, stored_benchmark
from milora_eval.scores.results import read_results
from milora_vl.common.errors import UserError

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
