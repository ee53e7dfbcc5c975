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

from milora_vl.adapter import checkpoints
from milora_vl.base import atomic_write
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import amount, require_folder
from milora_vl.recipe.schema import Recipe

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
    found: frozenset[tuple[str, int]] = frozenset()  # weights and checkpoints in it when it was chosen, see `_results`

    def require_unchanged(self) -> None:
        """Raise UserError if another training has saved weights here since this folder was chosen.

        Loading a model takes minutes, and only the first step locks the folder.
        """
        if written := sorted(name for name, _ in _results(self.path) - self.found):
            raise UserError(
                f"another training has written to the folder meanwhile ({written[0]}); nothing is overwritten",
                code="run-exists",
                where=str(self.path),
                hint=f"use another --output_dir\nsee it: python -m milora_vl.report {self.path}",
            )

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
        _refuse_to_overwrite(path)
        return RunFolder(path, found=_results(path))
    if not checkpoints.is_word(wanted):
        chosen = _require_complete(Path(wanted))
        if chosen.resolve().parent != path.resolve():
            _refuse_to_overwrite(path)
        return RunFolder(path, chosen, found=_results(path))
    checkpoint, skipped = checkpoints.latest(path)
    if checkpoint is None and wanted.lower() != "auto":
        reasons = [f"{folder.name}: {reason}" for folder, reason in skipped] or ["the folder has no checkpoint"]
        raise UserError(
            "nothing to resume from\n" + "\n".join(reasons), code="resume-no-checkpoint", where=str(path),
            hint="remove --resume_from_checkpoint to start, or use auto to resume only if there is a checkpoint",
        )  # fmt: skip
    if checkpoint is None and checkpoints.holds_weights(path) and not checkpoints.read_environment(path):
        _refuse_to_overwrite(path)
    return RunFolder(path, checkpoint, tuple(skipped), _results(path))


def without_token(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Return the recipe without its hub_token, and the token: run folders are shared, so they must not hold it."""
    train = dict(recipe.train)
    token = train.pop("hub_token", None)
    return recipe.model_copy(update={"train": train}), token


def _results(path: Path) -> frozenset[tuple[str, int]]:
    """Return the names of the weights and checkpoints of a folder; weights with their time of change (ns)."""
    files = [path / name for name in checkpoints.WEIGHTS if (path / name).is_file()]
    weights = {(file.name, file.stat().st_mtime_ns) for file in files}
    return frozenset(weights | {(folder.name, 0) for folder in checkpoints.checkpoints(path)})


def _refuse_to_overwrite(path: Path) -> None:
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
    inside = [path.name for path in checkpoints.checkpoints(folder)]
    if reason and inside and checkpoints.step_of(folder) < 0:
        newest, _ = checkpoints.latest(folder)
        raise UserError(
            f"{folder} is the folder of a run, not a checkpoint; it holds {', '.join(inside[-3:])}",
            code="resume-run-folder",
            where="--resume_from_checkpoint",
            hint=f"use  --resume_from_checkpoint {newest}" if newest else "none of its checkpoints is complete",
        )
    if reason:
        raise UserError(
            f"cannot resume from {folder}: {reason}",
            code="checkpoint-incomplete",
            where="--resume_from_checkpoint",
            hint="use another checkpoint, or  --resume_from_checkpoint auto  for the newest complete one",
        )
    return folder
