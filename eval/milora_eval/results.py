"""results.json: the numbers of one model on one suite, computed from the lines of predictions.jsonl alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from milora_data.errors import UserError
from milora_eval.benchmark import Metric
from milora_eval.lines import to_answer
from milora_eval.store import PREDICTIONS, Line, read_lines, write_lines
from milora_eval.suites import find_benchmark

RESULTS, TABLE = "results.json", "table.md"
Results = dict[str, Any]


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return the `benchmarks` entry of results.json; every answer is scored anew."""
    found = []
    for name in dict.fromkeys(line["benchmark"] for line in lines):
        benchmark = find_benchmark(name)
        answers = [to_answer(benchmark, line) for line in lines if line["benchmark"] == name]
        found.append(
            {
                "name": benchmark.name,
                "version": benchmark.version,
                "protocol": benchmark.protocol,
                "split": benchmark.split,
                "n": len(answers),
                "metrics": [asdict(metric) for metric in benchmark.summarise(answers)],
            }
        )
    return found


def score(folder: str | Path) -> Results:
    """Score the stored answers of an evaluation again, without its model, and rewrite its results.json.

    Raises UserError for a folder without answers.
    """
    folder = Path(folder)
    lines = require_lines(folder)
    write_lines(folder / PREDICTIONS, [_rescored(line) for line in lines])
    results = read_results(folder) | {"benchmarks": summarise(lines), "predictions": lines_digest(lines)}
    write_results(folder, results)
    return results


def require_lines(folder: Path) -> list[Line]:
    """Return the answers in `folder`; UserError that names the folders which have some."""
    lines = read_lines(folder / PREDICTIONS)
    if not lines:
        near = sorted(path.parent for path in folder.glob(f"**/{PREDICTIONS}"))[:5] if folder.is_dir() else []
        hint = "there are answers in: " + ", ".join(map(str, near)) if near else "make some: python -m milora_eval run"
        raise UserError(f"{folder} holds no answers: no {PREDICTIONS}\n{hint}")
    return lines


def lines_digest(lines: Sequence[Line]) -> str:
    """Return a hash of who was asked what and answered what."""
    answers = [[line["benchmark"], line["id"], line["prediction"]] for line in lines]
    return hashlib.sha256(json.dumps(answers, ensure_ascii=False).encode()).hexdigest()[:16]


def read_results(folder: Path) -> Results:
    """Return the results.json of a folder, an empty dict where there is none."""
    path = folder / RESULTS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json as a whole."""
    write_text(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write one file as a whole: a killed process leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def metrics_of(results: Mapping[str, Any]) -> dict[tuple[str, str], Metric]:
    """Return the metrics of results by (benchmark, name)."""
    return {
        (entry["name"], metric["name"]): Metric(**metric)
        for entry in results.get("benchmarks", ())
        for metric in entry["metrics"]
    }


def _rescored(line: Line) -> Line:
    return line | {"correct": to_answer(find_benchmark(line["benchmark"]), line).value}
