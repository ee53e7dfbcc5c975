"""Checkpoints of a run: list, newest, complete or cut off.

A checkpoint is a folder of HF's Trainer: weights, optimizer, scheduler, random states of all processes and, written
last, trainer_state.json. DeepSpeed stores the optimizer in a folder global_stepN, with a file per process. A checkpoint
is incomplete if its process was killed while writing it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

# Weight files of a checkpoint; the adapter comes first.
WEIGHTS = ("adapter_model.safetensors", "mm_projector.safetensors", "model.safetensors", "model.safetensors.index.json")
SET_ASIDE = "incomplete-"
STATE = "trainer_state.json"
HELD_OUT = "held_out.jsonl"  # losses of the held-out records, highest first
# Files that only a resumed run needs.
NO_RESULT = (
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "stream_state_*.pth", "latest", "zero_to_*.py",
    STATE,
)  # fmt: skip
SHARDS = "global_step*/*_optim_states.pt"
SHARDED_WEIGHTS = "global_step*/zero_pp_rank_*_model_states.pt"  # only with ZeRO-3


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint, -1 for any other folder.

    >>> step_of(Path("runs/a/checkpoint-20"))
    20
    """
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def checkpoints(run: Path) -> list[Path]:
    folders = [folder for folder in run.glob("checkpoint-*") if folder.is_dir() and step_of(folder) >= 0]
    return sorted(folders, key=step_of)


def newest_checkpoint(run: Path) -> Path | None:
    return next((folder for folder in reversed(checkpoints(run)) if holds_weights(folder)), None)


def holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def why_incomplete(folder: Path) -> str | None:
    """Return what is missing in a checkpoint; None if a run can resume from it."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except OSError:
        return f"has no {STATE} (the run was killed while writing it)"
    except ValueError:
        return f"{STATE} is truncated"
    if not isinstance(state, dict) or (step_of(folder) >= 0 and state.get("global_step") != step_of(folder)):
        return f"{STATE} is of another step"
    if not holds_weights(folder) and not is_sharded(folder):
        return "has no weights"
    if not list(folder.glob("rng_state*.pth")) or not (is_sharded(folder) or (folder / "optimizer.pt").is_file()):
        return "has no optimizer and random state (--save_only_model): evaluation works, resuming does not"
    if is_sharded(folder) and len(list(folder.glob(SHARDS))) != num_processes(folder):
        return f"has the optimizer of {len(list(folder.glob(SHARDS)))} of {num_processes(folder)} processes"
    return None


def latest(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest complete checkpoint, and the newer incomplete ones with the reason."""
    skipped: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(run)):
        reason = why_incomplete(folder)
        if reason is None:
            return folder, skipped
        skipped.append((folder, reason))
    return None, skipped


def resume_hint(run: Path) -> str:
    newest, _ = latest(run)
    if newest is None:
        return "there is no checkpoint yet; the same command with  --resume_from_checkpoint auto  starts again"
    return f"the same command with  --resume_from_checkpoint auto  continues from step {step_of(newest)}"


def is_sharded(folder: Path) -> bool:
    return any(folder.glob("global_step*"))


def zero_stage(folder: Path) -> int:
    """Return the ZeRO stage of a checkpoint: 0 without DeepSpeed, 2 or 3 (stage 1 counts as 2)."""
    if not is_sharded(folder):
        return 0
    return 3 if any(folder.glob(SHARDED_WEIGHTS)) else 2


def num_processes(folder: Path) -> int:
    return 1 if (folder / "rng_state.pth").is_file() else len(list(folder.glob("rng_state_*.pth")))


def copy_results(folder: Path, run: Path) -> None:
    for file in folder.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in NO_RESULT):
            shutil.copy2(file, run / file.name)


def set_aside(folder: Path) -> Path:
    """Rename an incomplete checkpoint, so that rotation and later resumes ignore it. Return the new path."""
    number = 0
    target = folder.with_name(SET_ASIDE + folder.name)
    while target.exists():
        number += 1
        target = folder.with_name(f"{SET_ASIDE}{folder.name}.{number}")
    return folder.rename(target)


def is_finished(path: Path) -> bool:
    return bool(read_environment(path).get("finished")) and holds_weights(path)


def resumed_run(output_dir: str | None, resume: str | None) -> Path | None:
    wanted = asked_for(resume)
    if wanted is None:
        return None
    if not is_word(wanted):
        return Path(wanted).parent
    run = None if output_dir is None else Path(output_dir)
    return run if run is not None and (checkpoints(run) or is_finished(run)) else None


def asked_for(resume: str | None) -> str | None:
    return None if resume is None or resume.lower() in ("false", "no", "none") else resume


def is_word(wanted: str) -> bool:
    return wanted.lower() in ("true", "yes", "1", "auto")


def read_environment(path: Path) -> dict[str, Any]:
    """Return environment.json of a run; empty if it is missing or truncated."""
    try:
        content = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
