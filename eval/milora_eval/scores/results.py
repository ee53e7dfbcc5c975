"""Compute and write results.json, the numbers of one model on one suite, from the lines of predictions.jsonl alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from milora_eval.answers.store import PREDICTIONS, Line, each_line, expected_of, read_lines, to_answer
from milora_eval.benchmark import Metric
from milora_eval.registry import SUITES, stored_benchmark
from milora_eval.stats import mean
from milora_vl.common.atomic_write import read_json, write_json
from milora_vl.common.errors import UserError, expected_format, no_folder

RESULTS, TABLE = "results.json", "table.md"
Results = dict[str, Any]


def numbers(folder: Path, suite: str) -> dict[str, Any]:
    by_benchmark: dict[str, list[Line]] = {}
    for line in each_line(folder / PREDICTIONS):
        by_benchmark.setdefault(line["benchmark"], []).append(line)
    entries = [_entry(name, lines) for name, lines in by_benchmark.items()]
    answers = sorted((line["question_key"], line["prediction"]) for lines in by_benchmark.values() for line in lines)
    total = hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]
    return {"benchmarks": entries, "mean": suite_mean(suite, entries), "predictions": total}


def suite_mean(suite: str, entries: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the mean of the headlines that the suite averages, in percent, unrounded; None if one is missing."""
    wanted = SUITES[suite].mean if suite in SUITES else ()
    headlines = {entry["name"]: entry["metrics"][0]["value"] for entry in entries if entry["metrics"]}
    if not wanted or not set(wanted) <= set(headlines):
        return None
    return {"value": mean([100 * headlines[name] for name in wanted]), "of": list(wanted)}


def require_answers(folder: Path) -> None:
    """Raise UserError if a folder has no answers; the hint lists subfolders that have some."""
    if not folder.is_dir():
        raise UserError(problems=[replace(no_folder(folder, str(folder)), message="no such folder")])
    if next(each_line(folder / PREDICTIONS), None) is None:
        near = ", ".join(str(path.parent) for path in sorted(folder.glob(f"**/{PREDICTIONS}"))[:5])
        hint = f"there are answers in: {near}" if near else "to generate answers: python -m milora_eval run"
        raise UserError(
            f"no answers: the folder has no {PREDICTIONS}", code="eval-no-answers", where=str(folder), hint=hint
        )


def require_lines(folder: Path) -> list[Line]:
    require_answers(folder)
    return read_lines(folder / PREDICTIONS)


def check_ids(folder: Path, results: Mapping[str, Any]) -> None:
    """Raise UserError if an answer appears twice, or if there are fewer answers than results.json counts."""
    path = folder / PREDICTIONS
    times = Counter((line["benchmark"], line["id"]) for line in each_line(path))
    (benchmark, name), most = max(times.items(), key=lambda entry: entry[1])
    if most > 1:
        message, hint = f'{benchmark} has two answers for the id "{name}"', "delete one of them, then score again"
        raise UserError(message, code="predictions-duplicate-id", where=str(path), hint=hint)
    expected = sum(entry["n"] for entry in results.get("benchmarks", ()))
    if len(times) < expected:
        message = f"{path} holds {len(times)} answers, expected {expected}"
        hint = "generate them: run the same  python -m milora_eval run  again"
        raise UserError(message, code="predictions-missing-ids", hint=hint)


def read_results(folder: Path) -> Results:
    """Return the results.json of a folder, or an empty dict. Raises UserError if it has another format."""
    message = "not the results of an evaluation"
    hint = "restore the file, or remove it and score the answers again"
    with expected_format(message, code="results-format", where=str(folder / RESULTS), hint=hint):
        results = read_json(folder / RESULTS) or {}
        for entry in results.get("benchmarks", ()):
            for metric in entry["metrics"]:
                Metric(**metric)
    return results


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    write_json(folder / RESULTS, results)


def metrics_of(results: Mapping[str, Any]) -> dict[tuple[str, str], Metric]:
    return {
        (entry["name"], metric["name"]): Metric(**metric)
        for entry in results.get("benchmarks", ())
        for metric in entry["metrics"]
    }


def headlines(results: Mapping[str, Any]) -> dict[str, Metric]:
    entries = results.get("benchmarks", ())
    return {entry["name"]: Metric(**entry["metrics"][0]) for entry in entries if entry["metrics"]}


class Headline(NamedTuple):
    """The one number of an evaluation: of a single benchmark, or the mean of several, which `metric` says."""

    benchmarks: tuple[str, ...]
    metric: str
    value: float
    stderr: float | None


def headline_of(results: Mapping[str, Any]) -> Headline:
    """Return the mean of a suite, else of all headlines that are fractions, else the first headline.

    Raises LookupError without a score.
    """
    found = headlines(results)
    of = (results.get("mean") or {}).get("of") or [name for name, each in found.items() if each.unit == "fraction"]
    metrics = {name: found[name] for name in of or list(found)[:1]}
    errors = [each.stderr for each in metrics.values() if each.stderr is not None]
    stderr = math.hypot(*errors) / len(errors) if len(errors) == len(metrics) else None
    first = next(iter(metrics.values()), None)
    if first is None:
        raise LookupError("no score: a server or an official script scores these benchmarks")
    metric = first.name if len(metrics) == 1 else f"mean of {len(metrics)}"
    return Headline(tuple(metrics), metric, mean([each.value for each in metrics.values()]), stderr)


def _entry(name: str, lines: Sequence[Line]) -> dict[str, Any]:
    benchmark = stored_benchmark(name)
    # The order of the questions in their file changes no digit of a number.
    answers = [to_answer(line) for line in sorted(lines, key=lambda line: line["question_key"])]
    with expected_of(benchmark, name):
        metrics = [asdict(metric) for metric in benchmark.summarise(answers)]
    return {
        "name": benchmark.name,
        "reference": name,
        "version": benchmark.version,
        "protocol": benchmark.protocol,
        "split": benchmark.split,
        "n": len(lines),
        "truncated": sum(bool(line.get("truncated")) for line in lines),
        "metrics": metrics,
    }
