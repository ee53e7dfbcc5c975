"""Which checkpoints of a run can be resumed from. A process may be killed while it writes one.

A checkpoint is HF Trainer's folder: weights, optimizer, scheduler, random states of all processes, and last of all
trainer_state.json. DeepSpeed keeps the optimizer in a folder global_stepN, with a file for each process.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

WEIGHTS = ("adapter_model.safetensors", "mm_projector.safetensors", "model.safetensors", "model.safetensors.index.json")
SET_ASIDE = "incomplete-"
# What only a resumed run needs.
NO_RESULT = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "latest",
    "zero_to_*.py",
    "trainer_state.json",
)
SHARDS = "global_step*/*_optim_states.pt"
SHARDED_WEIGHTS = "global_step*/zero_pp_rank_*_model_states.pt"  # of ZeRO-3 alone


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
    if is_sharded(folder) and len(list(folder.glob(SHARDS))) != num_processes(folder):
        return f"has the optimizer of {len(list(folder.glob(SHARDS)))} of {num_processes(folder)} processes"
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


def where_to_go_on(run: Path) -> str:
    """What a run that was stopped goes on from, in words."""
    newest, _ = latest(run)
    if newest is None:
        return "no checkpoint was saved yet; the same command with  --resume_from_checkpoint auto  begins again"
    return f"the same command with  --resume_from_checkpoint auto  goes on from step {step_of(newest)}, the last saved"


def is_sharded(folder: Path) -> bool:
    """Whether DeepSpeed wrote the optimizer of a checkpoint."""
    return any(folder.glob("global_step*"))


def zero_stage(folder: Path) -> int:
    """Which stage of ZeRO a checkpoint is of: 0 without DeepSpeed, 3, or 2 (which 1 looks like)."""
    if not is_sharded(folder):
        return 0
    return 3 if any(folder.glob(SHARDED_WEIGHTS)) else 2


def num_processes(folder: Path) -> int:
    """Of the run that wrote a checkpoint, by its files of random states."""
    return 1 if (folder / "rng_state.pth").is_file() else len(list(folder.glob("rng_state_*.pth")))


def copy_results(folder: Path, run: Path) -> None:
    """Put what a checkpoint holds besides the means to resume (weights, processor, ...) at the root of a run."""
    for file in folder.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in NO_RESULT):
            shutil.copy2(file, run / file.name)


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
    if file.suffix in (".pt", ".pth"):
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
