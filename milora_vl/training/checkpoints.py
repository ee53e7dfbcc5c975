"""Which checkpoints of a run can be resumed from. A process may be killed while it writes one.

A checkpoint is HF Trainer's folder: weights, optimizer, scheduler, random states, and last of all trainer_state.json.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

WEIGHTS = ("adapter_model.safetensors", "mm_projector.safetensors", "model.safetensors", "model.safetensors.index.json")
SET_ASIDE = "incomplete-"


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


def why_incomplete(folder: Path) -> str | None:
    """What is missing or cut off in a checkpoint; None where it can be resumed from."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except OSError:
        return "has no trainer_state.json (the run was killed while it was written)"
    except ValueError:
        return "trainer_state.json is cut off"
    if step_of(folder) >= 0 and state.get("global_step") != step_of(folder):
        return f"trainer_state.json is of step {state.get('global_step')}"
    if not any((folder / name).is_file() for name in WEIGHTS) and not list(folder.glob("global_step*")):
        return "has no weights"
    if not list(folder.glob("rng_state*.pth")):
        return "has no optimizer or random state (--save_only_model); it can be evaluated, not resumed"
    for file in folder.rglob("*"):
        if _is_cut_off(file):
            return f"{file.name} is cut off"
    return None


def latest(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The last checkpoint that can be resumed from, and the later ones that cannot, with the reason."""
    skipped: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(run)):
        reason = why_incomplete(folder)
        if reason is None:
            return folder, skipped
        skipped.append((folder, reason))
    return None, skipped


def set_aside(folder: Path) -> Path:
    """Rename an incomplete checkpoint, so that neither rotation nor a later resume counts it. Returns the new path."""
    number = 0
    target = folder.with_name(SET_ASIDE + folder.name)
    while target.exists():
        number += 1
        target = folder.with_name(f"{SET_ASIDE}{folder.name}.{number}")
    return folder.rename(target)


def _is_cut_off(file: Path) -> bool:
    if file.suffix == ".safetensors":
        return _is_cut_off_safetensors(file)
    if file.name in ("optimizer.pt", "scheduler.pt", "scaler.pt") or file.suffix == ".pth":
        return not zipfile.is_zipfile(file)  # torch.save writes a zip, whose directory comes last
    return False


def _is_cut_off_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
    if len(header) < length or not header:
        return True
    try:
        entries = json.loads(header)
    except ValueError:
        return True
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    return file.stat().st_size < 8 + length + max(ends, default=0)
