"""Answers to six GQA questions in an evaluation folder, written without a model."""

from __future__ import annotations

from pathlib import Path

from milora_eval.answers.store import Store, to_line
from milora_eval.registry import find_benchmark
from milora_eval.scores.results import numbers, write_results
from milora_vl.models.generate import Reply
from support import official_data


def write_answers(folder: Path, name: str, texts: list[str]) -> Path:
    benchmark = find_benchmark("gqa")
    official_data.gqa(official_data.made(folder / "gqa"))
    items = benchmark.load(folder / "gqa")
    out = folder / "run" / "eval" / "gqa" / name
    lines = [to_line(benchmark, item, Reply(text), item.id, folder) for item, text in zip(items, texts, strict=True)]
    Store(out).finish(lines)
    write_results(out, {"suite": "gqa", "which": name} | numbers(out, "gqa"))
    return out
