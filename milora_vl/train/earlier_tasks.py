"""`--after FOLDER`: the tasks that a run comes after, and a sample of their records for its calibration.

milora.json of the run lists all tasks in order, the run's own last. An entry holds all that reads the records again:

    {"run": "runs/a", "template": "vicuna_v1", "records": 1200, "fingerprint": "4f0c...",
     "data": {"path": "a.json", "image_folder": "pictures", "eval_path": "held_out.json"},   # set keys of the recipe
     "eval": {"suites": ["emoji"], "data": "questions"},                                      # the same
     "rules": [{"tower": "language", "method": "gradient", "rank": 64, "protect": 0.95, "modules": 224}]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milora_data.records.record import Record
from milora_vl.common.cli.command_line import amount
from milora_vl.common.errors import Key, UserError, with_context
from milora_vl.core.adapter.checkpoints import read_environment
from milora_vl.core.adapter.earlier import APART_FILE
from milora_vl.core.adapter.names import module_path
from milora_vl.core.adapter.sidecar import Sidecar, read_sidecar
from milora_vl.core.calibration.texts import SEED
from milora_vl.core.policy import Target
from milora_vl.models.recipe_of_run import recipe_of_run
from milora_vl.train.plan import run_data
from milora_vl.train.plan.run_data import RunData
from milora_vl.train.recipe.schema import DataConfig, EvalConfig, Recipe, SourceConfig

NUM_RECORDS = 128  # of each earlier task
HINT = "name records like those of the earlier runs:  calibration: {earlier: FILE}"

Task = Mapping[str, Any]


def entry(run: Path, recipe: Recipe, targets: Sequence[Target], counts: Mapping[str, Any], fingerprint: str) -> Task:
    """Return the entry of a task in milora.json."""
    kinds = Counter((t.tower, t.method, t.rank, t.protect) for t in targets)
    return {
        "run": str(run),
        "template": recipe.template,
        "records": counts.get("train"),
        "fingerprint": fingerprint,
        "data": recipe.data.model_dump(exclude_defaults=True),
        "eval": recipe.eval.model_dump(exclude_defaults=True),
        "rules": [
            {"tower": tower, "method": method, "rank": rank, "protect": protect, "modules": count}
            for (tower, method, rank, protect), count in kinds.items()
        ],
    }
