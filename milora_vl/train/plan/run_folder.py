"""The run folder: default name, `--output_dir`, overwriting and resuming refused or allowed, files written into it.

Beside the files of HF's Trainer it holds recipe.yaml, environment.json, policy.json, spectrum.json, the processor and
README.md; see docs for their formats.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from milora_vl.common import atomic_write
from milora_vl.common.cli.command_line import amount, require_folder
from milora_vl.common.errors import UserError
from milora_vl.core.adapter import checkpoints
from milora_vl.train.recipe.schema import Recipe

ENVIRONMENT, CARD = "environment.json", "README.md"  # shared with others, so secrets in them are hidden
LOCK = "_running.lock"  # the hub's upload leaves out names that begin with _
WAIT = 8.0  # seconds for the lock: loader processes of a killed training notice its end, and leave, within five
OWN_FILES = ("recipe.yaml", CARD, "policy.json", "report.html")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder for a run, and the checkpoint that the run resumes from."""

    path: Path
    checkpoint: Path | None = None
    incomplete: tuple[tuple[Path, str], ...] = ()  # skipped checkpoints, with the reason
    is_new: bool = True  # it holds no run, and must hold none when the first step begins

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file atomically: a killed process leaves the old file or the new one."""
        atomic_write.write_json(self.path / name, content, hides_secrets=name == ENVIRONMENT)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        atomic_write.write_text(self.path / name, text, hides_secrets=name == CARD)


def lock(folder: Path) -> FileLock:
    """Return the lock of an existing run folder, which this process now holds. Raises UserError if another one does.

    The system releases it when the process ends, also after a kill.
    """
    held = FileLock(folder / LOCK)
    try:
        held.acquire(timeout=WAIT)
    except Timeout:
        raise UserError(
            "another training runs in this folder",
            code="run-in-use",
            where=str(folder),
            hint="wait for its end, or stop it, then:  --resume_from_checkpoint auto\nor use another --output_dir",
        ) from None
    return held


def unlock(folder: Path, held: FileLock) -> None:
    """Remove and release the lock of a run folder."""
    with suppress(OSError):  # the disk is lost
        (folder / LOCK).unlink(missing_ok=True)  # before the release: nobody else can hold this file
    held.release()


def require_free(folder: Path) -> None:
    """Raise UserError if a process trains in `folder` now."""
    if (folder / LOCK).exists():  # a training that was killed leaves the file, without the lock
        unlock(folder, lock(folder))


def default_path(recipe: Recipe, now: datetime) -> Path:
    """Return runs/MODEL/METHOD/TIME, such as `runs/llava-1.5-7b/milora-r128/2026-11-25_043607`.

    Raises UserError for a run with several processes: each would name a folder by its clock.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a run on several devices needs --output_dir",
            code="flag-required",
            where="--output_dir",
            hint="add:  --output_dir FOLDER",
        )
    first = (recipe.policy or [{}])[0]
    rank = first.get("rank")
    method = str(first.get("method", "milora")) + (f"-r{rank}" if isinstance(rank, int) else "")
    return Path("runs") / Path(recipe.model).name / method / now.strftime("%Y-%m-%d_%H%M%S")


def choose(path: Path, resume: str | None) -> RunFolder:
    """Return the folder of the run, for `--resume_from_checkpoint` (None, true, auto, or a folder).

    Raises UserError, before anything is written, if a run would be overwritten or if there is nothing to resume.
    """
    require_folder(path)
    require_free(path)
    wanted = checkpoints.asked_for(resume)
    if wanted is None:
        refuse_to_overwrite(path)
        return RunFolder(path)
    if not checkpoints.is_word(wanted):
        chosen = _require_complete(Path(wanted))
        is_new = chosen.resolve().parent != path.resolve()
        if is_new:
            refuse_to_overwrite(path)
        return RunFolder(path, chosen, is_new=is_new)
    checkpoint, skipped = checkpoints.latest(path)
    if checkpoint is None and wanted.lower() != "auto":
        reasons = [f"{folder.name}: {reason}" for folder, reason in skipped] or ["the folder has no checkpoint"]
        raise UserError(
            "nothing to resume from\n" + "\n".join(reasons), code="resume-no-checkpoint", where=str(path),
            hint="remove --resume_from_checkpoint to start, or use auto to resume only if there is a checkpoint",
        )  # fmt: skip
    # Weights of a run that was killed before its first complete checkpoint are overwritten.
    restarts = bool(skipped) or (checkpoints.holds_weights(path) and bool(checkpoints.read_environment(path)))
    is_new = checkpoint is None and not restarts
    if is_new:
        refuse_to_overwrite(path)
    return RunFolder(path, checkpoint, tuple(skipped), is_new)


def without_token(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Return the recipe without its hub_token, and the token: run folders are shared, so they must not hold it."""
    train = dict(recipe.train)
    token = train.pop("hub_token", None)
    return recipe.model_copy(update={"train": train}), token


def refuse_to_overwrite(path: Path) -> None:
    """Raise UserError for a folder that holds a run, or files of somebody else under the names of a run's files."""
    weights = [name for name in checkpoints.WEIGHTS if (path / name).is_file()]
    steps = [folder.name for folder in checkpoints.checkpoints(path)]
    if weights:
        kind = "a finished run" if checkpoints.is_finished(path) else "trained weights"
        raise UserError(
            f"the folder holds {kind} ({weights[0]}); nothing is overwritten",
            code="run-exists",
            where=str(path),
            hint=f"use another --output_dir, or remove the folder\nsee it: python -m milora_vl.report {path}",
        )
    if steps:
        raise UserError(
            f"the folder holds {amount(len(steps), 'checkpoint')} ({steps[-1]}) of an unfinished run",
            code="run-unfinished",
            where=str(path),
            hint="to continue it:       --resume_from_checkpoint true\n"
            "to start a new run:   another --output_dir, or remove the folder",
        )
    foreign = [name for name in OWN_FILES if (path / name).exists()]
    if foreign and not checkpoints.read_environment(path):
        raise UserError(
            f"the folder holds {', '.join(foreign)}, but not from a milora_vl run",
            code="run-foreign-files",
            where=str(path),
            hint="use another --output_dir",
        )


def _require_complete(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(
            f"no such folder: {folder}",
            code="path-missing",
            where="--resume_from_checkpoint",
            hint="expected true, auto or a checkpoint folder",
        )
    reason = checkpoints.why_incomplete(folder)
    if reason:
        raise UserError(
            f"cannot resume from {folder}: {reason}",
            code="checkpoint-incomplete",
            where="--resume_from_checkpoint",
            hint="use another checkpoint, or  --resume_from_checkpoint auto  for the newest complete one",
        )
    return folder
