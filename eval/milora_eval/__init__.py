"""The public Python names: `Benchmark`, `Item`, `run`, `score`, each imported at its first use.

`python -m milora_eval --help` lists the commands. From Python:

from milora_eval import Benchmark, run, score
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milora_eval.benchmark import Answer, Benchmark, Item, Metric
    from milora_eval.run_suite import run
    from milora_eval.scores.table import score

# Loaded on first use: `run` needs torch, and the command reads its arguments before it imports torch.
_HOMES = {
    "Answer": "benchmark",
    "Benchmark": "benchmark",
    "Item": "benchmark",
    "Metric": "benchmark",
    "run": "run_suite",
    "score": "scores.table",
}

__all__ = ["Answer", "Benchmark", "Item", "Metric", "run", "score"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
