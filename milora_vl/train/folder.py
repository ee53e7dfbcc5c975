"""The run folder: its name, overwriting and resuming refused or allowed, and the files of a run's first step.

Beside the files of HF's Trainer it holds recipe.yaml, environment.json, policy.json, the processor and README.md; see
docs for their formats. A run that fails before its first step leaves no files.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from milora_vl.common import atomic_write
from milora_vl.common.cli.console import amount, require_folder
from milora_vl.common.cli.screen import Screen
from milora_vl.common.errors import UserError
from milora_vl.core.adapter import checkpoints
from milora_vl.report.read_run import HELD_OUT
from milora_vl.train.recipe import Recipe

ENVIRONMENT, CARD = "environment.json", "README.md"  # shared with others, so secrets in them are hidden
OWN_FILES = ("recipe.yaml", CARD, "policy.json", "report.html", HELD_OUT)
GIT_TIMEOUT = 10  # seconds
WAIT = 8  # seconds for the lock: loader processes of a killed training notice its end, and leave, within five
PACKAGES = ("milora-vl", "torch", "transformers", "peft", "accelerate", "timm", "deepspeed", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path
    checkpoint: Path | None = None
    incomplete: tuple[tuple[Path, str], ...] = ()  # skipped checkpoints, with the reason
    is_new: bool = True  # it holds no run, and must hold none when the first step begins

    @property
    def writes_policy(self) -> bool:
        """Return whether the run writes policy.json; a resumed run has it already."""
        return self.checkpoint is None or not (self.path / "policy.json").is_file()

    def write_json(self, name: str, content: Any) -> None:
        atomic_write.write_json(self.path / name, content, hides_secrets=name == ENVIRONMENT)

    def write_text(self, name: str, text: str) -> None:
        atomic_write.write_text(self.path / name, text, hides_secrets=name == CARD)


def default_path(recipe: Recipe, now: datetime) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = "a run on several devices needs --output_dir"
        raise UserError(message, code="flag-required", where="--output_dir", hint="add:  --output_dir FOLDER")
    first = (recipe.policy or [{}])[0]
    rank = first.get("rank")
    method = str(first.get("method", "milora")) + (f"-r{rank}" if isinstance(rank, int) else "")
    return Path("runs") / Path(recipe.model).name / method / now.strftime("%Y-%m-%d_%H%M%S")


def choose(path: Path, resume: str | None) -> RunFolder:
    """Return the folder of the run, for `--resume_from_checkpoint` (None, true, auto, or a folder)."""
    require_folder(path)
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
        message = "nothing to resume from\n" + "\n".join(reasons)
        hint = "remove --resume_from_checkpoint to start, or use auto to resume only if there is a checkpoint"
        raise UserError(message, code="resume-no-checkpoint", where=str(path), hint=hint)
    # Weights of a run that was killed before its first complete checkpoint are overwritten.
    restarts = bool(skipped) or (checkpoints.holds_weights(path) and bool(checkpoints.read_environment(path)))
    is_new = checkpoint is None and not restarts
    if is_new:
        refuse_to_overwrite(path)
    return RunFolder(path, checkpoint, tuple(skipped), is_new)


def refuse_to_overwrite(path: Path) -> None:
    """Raise UserError for a folder that holds a run, or files of somebody else under the names of a run's files."""
    weights = [name for name in checkpoints.WEIGHTS if (path / name).is_file()]
    steps = [folder.name for folder in checkpoints.checkpoints(path)]
    foreign = [name for name in OWN_FILES if (path / name).exists()]
    if weights:
        kind = "a finished run" if checkpoints.is_finished(path) else "trained weights"
        message, code = f"the folder holds {kind} ({weights[0]}); nothing is overwritten", "run-exists"
        hint = f"use another --output_dir, or remove the folder\nsee it: python -m milora_vl.report {path}"
    elif steps:
        message = f"the folder holds {amount(len(steps), 'checkpoint')} ({steps[-1]}) of an unfinished run"
        code, hint = "run-unfinished", "to continue it:       --resume_from_checkpoint true\n"
        hint += "to start a new run:   another --output_dir, or remove the folder"
    elif foreign and not checkpoints.read_environment(path):
        message, code = f"the folder holds {', '.join(foreign)}, but not from a milora_vl run", "run-foreign-files"
        hint = "use another --output_dir"
    else:
        return
    raise UserError(message, code=code, where=str(path), hint=hint)


def _require_complete(folder: Path) -> Path:
    where = "--resume_from_checkpoint"
    if not folder.is_dir():
        hint = "expected true, auto or a checkpoint folder"
        raise UserError(f"no such folder: {folder}", code="path-missing", where=where, hint=hint)
    if reason := checkpoints.why_incomplete(folder):
        hint = "use another checkpoint, or  --resume_from_checkpoint auto  for the newest complete one"
        raise UserError(f"cannot resume from {folder}: {reason}", where=where, hint=hint)
    return folder


@dataclass(kw_only=True)
class FirstFiles:
    folder: RunFolder
    recipe: Recipe
    environment: dict[str, Any]
    content: Mapping[str, Any]
    screen: Screen
    is_writer: bool  # one of several processes writes
    has_begun: bool = False

    def write(self) -> None:
        if self.has_begun:
            return
        if self.is_writer and self.folder.is_new:  # loading takes minutes, and another run may have begun here
            refuse_to_overwrite(self.folder.path)
        self.has_begun = True
        if not self.is_writer:
            return
        for checkpoint, reason in self.folder.incomplete:
            self.screen.warn(f"{checkpoint.name} {reason}; it is kept as {checkpoints.set_aside(checkpoint).name}")
        self.folder.write_text("recipe.yaml", self.recipe.to_yaml())
        self.folder.write_json(ENVIRONMENT, self.environment)
        for name, value in self.content.items():
            self.folder.write_json(name, value)


@contextmanager
def created(path: Path) -> Iterator[None]:
    """Create the folder of a run, and lock it; empty folders of a run that has not begun go again."""
    absent = [folder for folder in (path, *path.parents) if not folder.exists()]  # innermost first
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot create {path}: {error.strerror}"
        raise UserError(message, where="--output_dir") from None
    try:
        with locked(path):
            yield
    finally:
        for folder in absent:
            try:
                folder.rmdir()
            except OSError:  # not empty
                break


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a run folder. Raises UserError if another process does.

    The system releases it when the process and its loader processes end, also after a kill.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        for remaining in range(WAIT, -1, -1):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not remaining:
                    message = "another training runs in this folder"
                    hint = "wait for its end, or stop it, then:  --resume_from_checkpoint auto"
                    raise UserError(message, code="run-in-use", where=str(path), hint=hint) from None
                time.sleep(1)
        yield
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Return the commit of our source, and whether it has changed since; None without git or a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
