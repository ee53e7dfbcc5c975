"""Find the checkpoint-N folders of a run and their weights. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

# What a checkpoint is loaded from; the adapter comes first.
WEIGHTS = ("adapter_model.safetensors", "mm_projector.safetensors", "model.safetensors", "model.safetensors.index.json")


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name, -1 for any other folder.

    >>> step_of(Path("runs/a/checkpoint-20"))
    20
    """
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, in order of their steps."""
    found = [folder for folder in run.glob("checkpoint-*") if folder.is_dir() and step_of(folder) >= 0]
    return sorted(found, key=step_of)


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint with weights, or None."""
    return next((folder for folder in reversed(checkpoints(run)) if holds_weights(folder)), None)


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds an adapter, a projector or a model."""
    return any((folder / name).is_file() for name in WEIGHTS)
