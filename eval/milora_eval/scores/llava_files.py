"""LLaVA's own files, both ways: predictions of its scripts are scored by ours, and ours can be scored by its scripts.

questions.jsonl {question_id, image, text, category}, answers.jsonl {question_id, prompt, text, answer_id, model_id,
metadata} as llava/eval/model_vqa_loader.py writes them (MMBench: also round_id). Joined by id, never by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.errors import DataError, UserError
from milora_eval.answers.identity import digest
from milora_eval.answers.store import write_lines
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.data_files import read_jsonl


def write_llava_files(benchmark: Benchmark, answers: Iterable[Answer], folder: Path, model: str) -> list[Path]:
    """Write questions.jsonl and answers.jsonl for LLaVA's scripts; return them."""
    folder.mkdir(parents=True, exist_ok=True)
    questions, said = folder / "questions.jsonl", folder / "answers.jsonl"
    write_lines(questions, (benchmark.llava_question(answer.item) for answer in answers))
    write_lines(said, (_answer_line(benchmark, answer, model) for answer in answers))
    return [questions, said]


def _answer_line(benchmark: Benchmark, answer: Answer, model: str) -> dict[str, Any]:
    asked = benchmark.llava_question(answer.item)
    row = {"question_id": asked["question_id"], "prompt": asked["text"], "text": answer.text}
    if "round" in answer.item.meta:
        row |= {"question_id": answer.item.meta["index"], "round_id": 0}
    return row | {"answer_id": digest([answer.item.id, answer.text]), "model_id": model, "metadata": {}}


def read_llava_answers(path: Path) -> list[Mapping[str, Any]]:
    """Return the lines of an answers file; DataError for one that is none."""
    rows = list(read_jsonl(path))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
            raise DataError(
                f'{path}:{number}: expected {{"question_id": ..., "prompt": ..., "text": ...}}, got {row!r:.80}'
            )
    return rows


def join(benchmark: Benchmark, items: Sequence[Item], rows: Iterable[Mapping[str, Any]], path: Path) -> dict[str, str]:
    """Return the answer of every item, whatever the order of the rows.

    Raises UserError that names an id which is missing, there twice, or of no question.
    """
    places = {key: item.id for item in items for key in benchmark.llava_keys(item)}
    found: dict[str, str] = {}
    for row in rows:
        try:
            key = benchmark.llava_key(row)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: the answer {row['question_id']!r} cannot be placed: {error}") from None
        if key not in places:
            raise UserError(f"{path}: {benchmark.name} has no question {row['question_id']!r}\n{_hint(benchmark)}")
        if places[key] in found:
            raise UserError(f'{path}: two answers for the id "{places[key]}"')
        found[places[key]] = row["text"]
    missing = [item.id for item in items if item.id not in found]
    if missing:
        listed = ", ".join(f'"{name}"' for name in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{path}: {len(missing)} of {len(items)} answers are missing\nmissing ids: {listed}{more}")
    return found


def _hint(benchmark: Benchmark) -> str:
    if benchmark.name == "pope":
        return "the ids of LLaVA's POPE answers are those of llava_pope_test.jsonl: put it beside coco_pope_*.json"
    return f"are the predictions and the data of the same split? ({benchmark.name}: {benchmark.split})"
