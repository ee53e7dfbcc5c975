"""The files that a run writes when its first step begins. A run that fails earlier leaves no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.adapter import checkpoints
from milora_vl.plan.run_folder import ENVIRONMENT, RunFolder
from milora_vl.plan.run_lock import RunLock
from milora_vl.plan.screen import Screen
from milora_vl.recipe.schema import Recipe


@dataclass(kw_only=True)
class FirstFiles:
    """The first files of a run. Only a new run writes the files in `content` (policy.json, spectrum.json)."""

    folder: RunFolder
    fitted_recipe: Recipe
    environment: dict[str, Any]
    content: Mapping[str, Any]
    screen: Screen
    is_writer: bool  # one of several processes writes
    has_begun: bool = False
    absent: Sequence[Path] = field(default_factory=list)  # folders that the run creates, innermost first
    lock: RunLock = field(default_factory=RunLock)

    def __post_init__(self) -> None:
        path = self.folder.path
        self.absent = [folder for folder in (path, *path.parents) if not folder.exists()]

    def write(self) -> None:
        """Lock the run folder, write the files and rename incomplete checkpoints. Later calls do nothing."""
        if self.has_begun:
            return
        if self.is_writer:  # before has_begun: a run that another one locks out writes nothing
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.lock.take(self.folder.path)
            self.folder.require_unchanged()
        self.has_begun = True
        if not self.is_writer:
            return
        for checkpoint, reason in self.folder.incomplete:
            self.screen.warn(f"{checkpoint.name} {reason}; it is kept as {checkpoints.set_aside(checkpoint).name}")
        self.folder.write_text("recipe.yaml", self.fitted_recipe.to_yaml())
        self.folder.write_json(ENVIRONMENT, self.environment)
        for name, value in self.content.items():
            self.folder.write_json(name, value)

    def close(self) -> None:
        """Release the lock of the run folder, and remove the empty folders of a run that has not begun."""
        if self.is_writer and not self.has_begun:
            for folder in self.absent:
                try:
                    folder.rmdir()
                except OSError:  # not empty, or never created
                    break
        self.lock.release()


class AtFirstStep(TrainerCallback):
    """Call `act` when the first step begins, after its batch has loaded."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Call `act` before every step; `act` ignores repeated calls."""
        self.act()
