"""Whether a run may continue from a checkpoint: its recipe, records, steps, processes and ZeRO stage.

The optimizer, the schedule and the factors come from the checkpoint whatever the flags say, so a change of what decides
the weights is refused: the files of the run would describe a training that did not happen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.command import command_line
from milora_data.errors import UserError
from milora_vl.config import Recipe, RecipeError, load
from milora_vl.training import bases, hub, policy_edits, run_folder, training_args
from milora_vl.training.changes import Change, Side, because_of_schedule, changes, schedule_has_end
from milora_vl.training.checkpoints import is_sharded, num_processes, step_of, zero_stage
from milora_vl.training.run_data import RunData
from milora_vl.training.run_folder import RunFolder

START_ANEW = "to start a new run:  another --output_dir, without --resume_from_checkpoint"


class Resumed:
    """The run that a command continues, and what may differ now. Without such a run every check passes."""

    def __init__(self, folder: RunFolder, resume: str | None) -> None:
        self.run, self.checkpoint = folder, folder.checkpoint
        self.is_finished = (resume or "").lower() == "auto" and run_folder.is_finished(folder.path)
        self.folder = folder.path if folder.checkpoint is None else folder.checkpoint.parent
        self.changes: list[Change] = []
        self.recipe: Recipe | None = None
        self.environment: Mapping[str, Any] = {}
        if (self.checkpoint is None and not self.is_finished) or not (self.folder / "recipe.yaml").is_file():
            return
        self.environment = run_folder.read_environment(self.folder)
        try:
            self.recipe, _ = hub.without_token(load(self.folder / "recipe.yaml"))
        except RecipeError as error:
            raise UserError(f"cannot tell what {self.folder} was trained with\n{error}\n{START_ANEW}") from None

    def compare(self, recipe: Recipe, *, implicit_policy: bool, processes: int) -> list[str]:
        """Keep the changes that are allowed; raise UserError with a table of the others.

        implicit_policy: the rules are our default, whose projector rule goes where there is no projector.
        Returns a warning if there is no recipe to compare with.
        """
        if self.recipe is None:
            unknown = f"{self.folder} has no recipe.yaml, so its rates, data and template cannot be compared with these"
            return [unknown] if self.checkpoint is not None else []
        recipe = bases.named_as_composed(recipe, self.recipe.model)
        rules = recipe.policy or []
        if implicit_policy and len(rules) > len(self.recipe.policy or []):
            recipe = recipe.model_copy(update={"policy": policy_edits.without_projector(rules)})
        now = Side(recipe, processes, _dtype(recipe))
        before = Side(self.recipe, self._processes(processes), self.environment.get("dtype") or _dtype(self.recipe))
        found = changes(before, now, identifies_records="records" in self.environment)
        if any(change.is_refused for change in found):
            raise UserError(self._refusal(found, before.processes))
        self.changes = found
        return []

    def is_done(self) -> bool:
        """Tell whether the run is finished and gets no more steps. UserError where it does without a checkpoint."""
        if not self.is_finished:
            return False
        if not any(change.key in ("train.max_steps", "train.num_train_epochs") for change in self.changes):
            return True
        if self.checkpoint is None:
            raise UserError(f"{self.folder} is finished, and no checkpoint is left to train on from\n{START_ANEW}")
        return False

    def require_same_records(self, data: RunData) -> None:
        """Raise UserError if the records, or their order, differ from the ones that the run was trained on."""
        if self.recipe is None:
            return
        now, path = data.counts().get("train"), self.recipe.data.path
        had = self.environment.get("data", {}).get("train", now)
        if had == now and self.environment.get("records", data.fingerprint) == data.fingerprint:
            return
        where = f" ({path})" if isinstance(path, str) else ""
        numbers = f": there were {had:,}, now there are {now:,}" if had != now else ""
        raise UserError(
            f"these are not the records that {self._name()} was trained on{numbers}\n"
            f"to resume:           put the old records back{where}\n{START_ANEW}"
        )

    def continued(self, environment: dict[str, Any]) -> dict[str, Any]:
        """Return environment.json of a resumed run: when it began stays; how it was resumed is added."""
        assert self.checkpoint is not None
        is_own = self.folder.resolve() == self.run.path.resolve()
        entry: dict[str, Any] = {
            "from": self.checkpoint.name if is_own else str(self.checkpoint),
            "at": environment["started"],
        }
        if self.changes:
            entry["changed"] = {change.key: [change.before, change.now] for change in self.changes}
        started = self.environment.get("started", environment["started"])
        return {**environment, "started": started, "resumed": [*self.environment.get("resumed", []), entry]}

    def _processes(self, now: int) -> int:
        """Number of processes that wrote the checkpoint; `check` compares it for sharded ones."""
        return now if self.checkpoint is None or is_sharded(self.checkpoint) else num_processes(self.checkpoint)

    def _name(self) -> str:
        return str(self.checkpoint or self.folder)

    def _refusal(self, found: Sequence[Change], processes: int) -> str:
        rows = [("", "trained with", "now"), *(change.row() for change in found if change.is_refused)]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        table = "\n".join(f"  {key:<{widths[0]}}  {old:<{widths[1]}}  {new}" for key, old, new in rows)
        words = ("--recipe", self.folder, "--output_dir", self.folder, "--resume_from_checkpoint", "true")
        again = command_line("milora_vl.train", *words)
        if processes > 1:
            again = again.replace("python", f"torchrun --nproc_per_node {processes}", 1)
        return (
            f"{self._name()} was trained with other settings, and cannot continue with these\n{table}\n"
            f"to resume:           repeat the old values; {self.folder / 'recipe.yaml'} holds all of them:\n"
            f"                     {again}\n{START_ANEW}"
        )


def require_same_steps(checkpoint: Path, recipe: Recipe, steps: int) -> None:
    """UserError for a run that ends before its checkpoint, or elsewhere with a schedule that depends on the end."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    planned, now = state.get("max_steps", steps), Side(recipe, 1, "")
    if planned != steps and schedule_has_end(now):
        raise UserError(
            f"{checkpoint} is of a run of {planned:,} steps, this one has {steps:,}\n{because_of_schedule(now)}\n"
            f"to resume:           --max_steps {planned}\n{START_ANEW}"
        )
    if step_of(checkpoint) > steps:
        raise UserError(
            f"{checkpoint} is beyond the end of this run, step {steps:,}\n"
            "raise --max_steps or --num_train_epochs to train on from it"
        )


def check(checkpoint: Path, *, processes: int, stage: int) -> list[str]:
    """Warnings about what will not be as in an uninterrupted run.

    UserError where the optimizer cannot be put back: HF's Trainer would go on with a fresh one and say nothing, and
    DeepSpeed needs as many processes as wrote its shards. `stage` is ZeRO's, 0 without DeepSpeed; 1 counts as 2.
    """
    stage = 2 if stage == 1 else stage
    wrote, before = num_processes(checkpoint), zero_stage(checkpoint)
    if before != stage:
        raise UserError(
            f"{checkpoint} was written {_with(before)}; this run is {_with(stage)}\n"
            "the optimizer could not be put back\n"
            f"to resume:  {f'--deepspeed zero{before}' if before else 'leave --deepspeed out'}"
        )
    if wrote == processes:
        return []
    if stage:
        raise UserError(
            f"{checkpoint} holds the optimizer in {_count(wrote)}, a part for each process; now there are {processes}\n"
            f"to resume:  start {wrote} processes (torchrun --nproc_per_node {wrote} ...)"
        )
    return [
        f"{checkpoint.name} was written by {_count(wrote, 'process')}, now there are {processes}: the random states "
        "start again, so dropout differs from an uninterrupted run"
    ]


def _dtype(recipe: Recipe) -> str:
    return str(training_args.base_dtype(recipe, recipe.train)).removeprefix("torch.")


def _with(stage: int) -> str:
    return f"with ZeRO-{stage}" if stage else "without DeepSpeed"


def _count(number: int, what: str = "part") -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{number} {what if number == 1 else plural}"
