"""A sweep whose cells are written instead of trained."""

from __future__ import annotations

import json
from typing import Any

from milora_vl.sweep.cells import Cell
from milora_vl.sweep.runner import Sweep

RECIPE: dict[str, Any] = {
    "model": "tiny",
    "data": {"path": "train.json", "eval_path": "val.json"},
    "policy": [
        {"modules": "language", "method": "milora", "protect": 0, "rank": 4, "alpha": 8, "learning_rate": 1e-3},
        {"modules": "projector", "method": "full", "learning_rate": 1e-4},
    ],
    "train": {"max_steps": 6, "seed": 7, "warmup_steps": 0.03},
    "sweep": {
        "suite": "emoji",
        "train": {"max_steps": 3, "warmup_ratio": 0.1},
        "variants": {"strong": {"method": "lora", "alpha": 16, "train": {"weight_decay": 0.2}}},
    },
}


def finish_cell(sweep: Sweep, cell: Cell, *, loss: float, right: list[bool], forgetting: float, **more: str) -> None:
    """Write the files of a finished cell, with `more` numbers."""
    result = {
        "method": cell.method, "learning_rate": cell.learning_rate, "rank": cell.rank, "seed": cell.seed,
        "validation_loss": loss, "benchmark": "emoji", "metric": "accuracy", "score": sum(right) / len(right),
        "forgetting": forgetting, "seconds": 60.0, **more,
    }  # fmt: skip
    folder = sweep.results_folder(cell)
    folder.mkdir(parents=True)
    (sweep.folder / "cells" / f"{cell.name}.json").write_text(json.dumps(result))
    metric = {"name": "accuracy", "value": sum(right) / len(right), "stderr": None, "n": len(right)}
    scored = [{"name": "emoji", "reference": "emoji", "metrics": [metric]}]
    (folder / "results.json").write_text(json.dumps({"benchmarks": scored}))
    lines = [
        {
            "id": f"q{i}",
            "question_key": f"q{i}",
            "benchmark": "emoji",
            "correct": float(ok),
            "group": f"picture {i // 2}",
            "prediction": "x",
            "key": "",
        }
        for i, ok in enumerate(right)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
