"""Benchmarks for LLaVA-style models: ask (resumable), score, compare; `python -m milora_eval --help`.

from milora_eval import Benchmark, run, score
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milora_eval.benchmark import Answer, Benchmark, Item, Metric
    from milora_eval.evaluate import run
    from milora_eval.scores.results import score

# Loaded on first use: `run` needs torch, which the command must not import before it has read its arguments.
_HOMES = {
    "Answer": "benchmark",
    "Benchmark": "benchmark",
    "Item": "benchmark",
    "Metric": "benchmark",
    "run": "evaluate",
    "score": "scores.results",
}

__all__ = ["Answer", "Benchmark", "Item", "Metric", "run", "score"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
