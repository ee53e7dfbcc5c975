"""The run folder: where a run lives, whether it may start or resume there, and the files beside HF Trainer's own.

recipe.yaml, environment.json, policy.json, spectrum.json, the processor and README.md; see docs for their formats.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from milora_data import whole
from milora_data.errors import UserError
from milora_vl import checkpoints
from milora_vl.recipe.schema import Recipe

OWN_FILES = ("recipe.yaml", "README.md", "policy.json", "report.html")
GIT_PATIENCE = 10  # seconds
PACKAGES = ("milora-vl", "torch", "transformers", "peft", "accelerate", "timm", "deepspeed", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that may be written to, and the checkpoint that the run continues from."""

    path: Path
    checkpoint: Path | None = None
    incomplete: tuple[tuple[Path, str], ...] = ()  # checkpoints that were passed over, with the reason

    def write_json(self, name: str, content: Any) -> None:
        """Write one JSON file as a whole: a killed process leaves the old one or the new one."""
        whole.write_json(self.path / name, content)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file as a whole."""
        whole.write_text(self.path / name, text)


def default_path(recipe: Recipe, now: datetime) -> Path:
    """runs/MODEL/METHOD/TIME, as in `runs/llava-1.5-7b/milora-r128/2026-11-25_043607`.

    UserError for a run of several processes: their clocks would name several folders.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a run on several devices needs --output_dir")
    first = (recipe.policy or [{}])[0]
    rank = first.get("rank")
    method = str(first.get("method", "milora")) + (f"-r{rank}" if isinstance(rank, int) else "")
    return Path("runs") / Path(recipe.model).name / method / now.strftime("%Y-%m-%d_%H%M%S")


def is_finished(path: Path) -> bool:
    """Whether a training in this folder has come to its end."""
    return bool(read_environment(path).get("finished")) and any((path / name).is_file() for name in checkpoints.WEIGHTS)


def choose(path: Path, resume: str | None) -> RunFolder:
    """The folder to run in, by what is there and what `--resume_from_checkpoint` says (None, true, auto, or a folder).

    UserError, before anything is written, where a run would be overwritten or there is nothing to resume.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file, not a folder")
    wanted = None if resume is None or resume.lower() in ("false", "no", "none") else resume
    if wanted is None:
        _refuse_to_overwrite(path)
        return RunFolder(path)
    if wanted.lower() not in ("true", "yes", "1", "auto"):
        given = _given_checkpoint(Path(wanted))
        if given.resolve().parent != path.resolve():
            _refuse_to_overwrite(path)
        return RunFolder(path, given)
    checkpoint, skipped = checkpoints.latest(path)
    if checkpoint is None and wanted.lower() != "auto":
        reasons = [f"{folder.name}: {reason}" for folder, reason in skipped] or ["it holds no checkpoint"]
        raise UserError(
            f"nothing to resume from in {path}\n" + "\n".join(reasons)
            + "\nleave --resume_from_checkpoint out to start, or say auto to resume where there is something"
        )  # fmt: skip
    has_weights = any((path / name).is_file() for name in checkpoints.WEIGHTS)
    if checkpoint is None and has_weights and not read_environment(path):
        _refuse_to_overwrite(path)
    return RunFolder(path, checkpoint, tuple(skipped))


def read_environment(path: Path) -> dict[str, Any]:
    """Content of a run's environment.json, empty where there is none or it is cut off."""
    try:
        content = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def continued(before: Mapping[str, Any], now: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """environment.json of a resumed run: when it began stays, when it was resumed is added."""
    resumed = [*before.get("resumed", []), {"from": checkpoint.name, "at": now["started"]}]
    return {**now, "started": before.get("started", now["started"]), "resumed": resumed}


def describe_environment(
    recipe: Recipe, command: Sequence[str], *, base: str, device: str, data: Mapping[str, int]
) -> dict[str, Any]:
    """What environment.json says at the start of a run."""
    return {
        "command": list(command),
        "versions": {"python": sys.version.split()[0], **_versions()},
        "git": _git_state(),
        "device": device,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "finished": None,
        "seconds": 0.0,
        "seed": recipe.train.get("seed", 42),
        "model": recipe.model,
        "base": base,
        "data": dict(data),
    }


def _refuse_to_overwrite(path: Path) -> None:
    found = [name for name in checkpoints.WEIGHTS if (path / name).is_file()]
    steps = [folder.name for folder in checkpoints.checkpoints(path)]
    if found:
        what = f"a finished run ({found[0]})" if is_finished(path) else f"trained weights ({found[0]})"
        raise UserError(
            f"{path} holds {what}; nothing is overwritten\n"
            "give another --output_dir, or remove the folder to start afresh\n"
            f"see it: python -m milora_vl.report {path}"
        )
    if steps:
        raise UserError(
            f"{path} holds {len(steps)} checkpoints ({steps[-1]}) of a run that did not finish\n"
            "to continue it:    --resume_from_checkpoint true\n"
            "to start afresh:   another --output_dir, or remove the folder"
        )
    foreign = [name for name in OWN_FILES if (path / name).exists()]
    if foreign and not read_environment(path):
        raise UserError(f"{path} holds {', '.join(foreign)} that no run of ours wrote; give another --output_dir")


def _given_checkpoint(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(
            f"--resume_from_checkpoint {folder}: no such folder\nexpected true, auto or a checkpoint folder"
        )
    reason = checkpoints.why_incomplete(folder)
    if reason:
        raise UserError(f"--resume_from_checkpoint {folder}: cannot be resumed from: {reason}")
    return folder


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_state() -> dict[str, Any] | None:
    here = Path(__file__).parent
    try:
        commit = _git("-C", str(here), "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("-C", str(here), "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or a disk that is slow
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=GIT_PATIENCE
    ).stdout.strip()
