"""The start of a run: what it writes when the first step begins. A run that fails before leaves no file behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.config import Recipe
from milora_vl.training import checkpoints
from milora_vl.training.run_folder import RunFolder
from milora_vl.training.screen import Screen


@dataclass(kw_only=True)
class Opening:
    """The first files of a run; `content` holds those that only a new run writes (policy.json, spectrum.json)."""

    folder: RunFolder
    recipe: Recipe
    environment: dict[str, Any]
    content: Mapping[str, Any]
    screen: Screen
    is_writer: bool  # of several processes one writes
    has_begun: bool = False
    absent: Sequence[Path] = field(default_factory=list)  # folders that the run makes, the innermost first

    def __post_init__(self) -> None:
        path = self.folder.path
        self.absent = [folder for folder in (path, *path.parents) if not folder.exists()]

    def begin(self) -> None:
        """Write the files, and set aside the checkpoints that a kill has cut off. Does nothing the second time."""
        if self.has_begun:
            return
        self.has_begun = True
        if not self.is_writer:
            return
        self.folder.path.mkdir(parents=True, exist_ok=True)
        for cut_off, reason in self.folder.incomplete:
            self.screen.warn(f"{cut_off.name} {reason}; it is kept as {checkpoints.set_aside(cut_off).name}")
        self.folder.write_text("recipe.yaml", self.recipe.to_yaml())
        self.folder.write_json("environment.json", self.environment)
        for name, value in self.content.items():
            self.folder.write_json(name, value)

    def remove_empty_folders(self) -> None:
        """Remove the folders that were made for a run that has not begun, where nothing is in them."""
        if self.has_begun or not self.is_writer:
            return
        for folder in self.absent:
            try:
                folder.rmdir()
            except OSError:  # not empty, or never created
                return


class AtFirstStep(TrainerCallback):
    """Call `act` when the first batch is there and its step begins."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook before every step; `act` knows whether it was called before."""
        self.act()
