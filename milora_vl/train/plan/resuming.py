"""Check that a run can resume from a checkpoint: recipe, records, steps, processes, ZeRO stage; what it changed.

The optimizer, the schedule and the factors come from the checkpoint, not from the flags. So changes that affect the
weights are refused: the files of the run would describe a different training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_vl.common.cli.command_line import command_line
from milora_vl.common.errors import Problem, UserError
from milora_vl.core.adapter import checkpoints
from milora_vl.core.adapter.checkpoints import is_sharded, num_processes, step_of, zero_stage
from milora_vl.models.base import Base
from milora_vl.train.plan.base import named_as_composed
from milora_vl.train.plan.changes import Change, Side, changes, schedule_has_end, shown
from milora_vl.train.plan.run_data import RunData
from milora_vl.train.plan.run_folder import RunFolder, without_token
from milora_vl.train.plan.train_section import dtype_name
from milora_vl.train.recipe.schema import Recipe, load

NEW_RUN = "to start a new run:  another --output_dir, without --resume_from_checkpoint"


@dataclass(frozen=True, slots=True)
class Earlier:
    """The run that a command resumes, as its folder holds it."""

    folder: Path
    checkpoint: Path | None  # None: the run is finished and has none
    is_finished: bool  # --resume_from_checkpoint auto finds it at its end
    recipe: Recipe
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the checkpoint, or the folder, as errors name it."""
        return str(self.checkpoint or self.folder)


@dataclass(frozen=True, slots=True)
class Resumed:
    """An earlier run that may continue, and what has changed since."""

    earlier: Earlier
    changes: tuple[Change, ...]

    @property
    def gets_steps(self) -> bool:
        """Return whether there is something left to train: a finished run continues only for more steps."""
        is_longer = any(change.key in ("train.max_steps", "train.num_train_epochs") for change in self.changes)
        return is_longer or not self.earlier.is_finished


def read_earlier(run: RunFolder, resume: str | None) -> Earlier | None:
    """Return the run that `--resume_from_checkpoint` continues in this folder, None if a new run starts.

    Raises UserError without a recipe to compare with.
    """
    is_finished = (resume or "").lower() == "auto" and checkpoints.is_finished(run.path)
    if run.checkpoint is None and not is_finished:
        return None
    folder = run.path if run.checkpoint is None else run.checkpoint.parent
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            "there is no recipe.yaml beside it, so its learning rates, data and template are unknown",
            code="resume-no-recipe",
            where=str(run.checkpoint or folder),
            hint=f"copy the run's recipe.yaml into {folder}",
        )
    recipe, _ = without_token(load(folder / "recipe.yaml"))
    return Earlier(folder, run.checkpoint, is_finished, recipe, checkpoints.read_environment(folder))


def resumed(earlier: Earlier, recipe: Recipe, base: Base, processes: int) -> Resumed:
    """Return the earlier run with the changes. Raises UserError with a table of those that are refused."""
    recipe = named_as_composed(recipe, base, earlier.recipe.model)
    now = Side(recipe, processes, dtype_name(recipe))
    checkpoint, dtype = earlier.checkpoint, earlier.environment.get("dtype") or dtype_name(earlier.recipe)
    # `warnings` compares the processes of a sharded checkpoint.
    wrote = processes if checkpoint is None or is_sharded(checkpoint) else num_processes(checkpoint)
    before = Side(earlier.recipe, wrote, dtype)
    differences = changes(before, now)
    if any(change.is_refused for change in differences):
        raise UserError(problems=[_refusal(earlier, differences, wrote)])
    found = Resumed(earlier, tuple(differences))
    if found.gets_steps and earlier.checkpoint is None:
        raise UserError(
            "the run is finished, and it has no checkpoint to continue from",
            code="resume-no-checkpoint",
            where=str(earlier.folder),
            hint=NEW_RUN,
        )
    return found


def _refusal(earlier: Earlier, differences: Sequence[Change], processes: int) -> Problem:
    refused = [change for change in differences if change.is_refused]
    rows = [("", "trained with", "now"), *((c.key, shown(c.before), shown(c.now)) for c in refused)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    table = "\n".join(f"  {key:<{widths[0]}}  {old:<{widths[1]}}  {new}" for key, old, new in rows)
    words = ("--recipe", earlier.folder, "--output_dir", earlier.folder, "--resume_from_checkpoint", "true")
    command = command_line("milora_vl.train", *words)
    if processes > 1:
        command = command.replace("python", f"torchrun --nproc_per_node {processes}", 1)
    return Problem(
        f"{earlier.name} was trained with other settings and cannot continue with these:\n{table}",
        "resume-other-settings",
        hint=f"to resume:           repeat the old values; {earlier.folder / 'recipe.yaml'} holds all of them:\n"
        f"                     {command}\n{NEW_RUN}",
    )


def require_same_records(earlier: Earlier, data: RunData) -> None:
    """Raise UserError if the records, or their order, differ from the ones that the run was trained on."""
    count, path = data.counts().get("train"), earlier.recipe.data.path
    before = earlier.environment.get("data", {}).get("train", count)
    if before == count and earlier.environment.get("records", data.fingerprint) == data.fingerprint:
        return
    where = f" ({path})" if isinstance(path, str) else ""
    numbers = f": it had {before:,}, now there are {count:,}" if before != count else ""
    raise UserError(
        f"these are not the records that {earlier.name} was trained on{numbers}",
        code="resume-other-records",
        hint=f"to resume:           restore the old records{where}\n{NEW_RUN}",
    )


def continued(resumed: Resumed, run: RunFolder, environment: dict[str, Any]) -> dict[str, Any]:
    """Return environment.json of a resumed run: it keeps the start time and lists every resume."""
    earlier, checkpoint = resumed.earlier, resumed.earlier.checkpoint
    assert checkpoint is not None
    is_same_run = earlier.folder.resolve() == run.path.resolve()
    entry: dict[str, Any] = {
        "from": checkpoint.name if is_same_run else str(checkpoint),
        "at": environment["started"],
    }
    if resumed.changes:
        entry["changed"] = {change.key: [change.before, change.now] for change in resumed.changes}
    started = earlier.environment.get("started", environment["started"])
    return {**environment, "started": started, "resumed": [*earlier.environment.get("resumed", []), entry]}


def require_same_steps(checkpoint: Path, recipe: Recipe, steps: int) -> None:
    """Raise UserError if the run ends before its checkpoint, or if its schedule depends on a changed last step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # `choose` has read it
    planned, now = state.get("max_steps", steps), Side(recipe, 1, "")
    if planned != steps and schedule_has_end(now):
        raise UserError(
            f"the checkpoint belongs to a run of {planned:,} steps, this run has {steps:,}; the learning rates of the "
            f"{now.train('lr_scheduler_type')} schedule depend on the last step",
            code="resume-other-steps",
            where=str(checkpoint),
            hint=f"to resume:           --max_steps {planned}\n{NEW_RUN}",
        )
    if step_of(checkpoint) > steps:
        raise UserError(
            f"the checkpoint is beyond the end of this run, step {steps:,}",
            code="resume-beyond-end",
            where=str(checkpoint),
            hint="increase --max_steps or --num_train_epochs to continue from it",
        )


def require_same_checkpoint(run: Path, names: Sequence[str | None]) -> None:
    """Raise UserError if processes would resume from different checkpoints; `names` has one for each rank.

    A machine that does not see the output folder of the first one would start again while the others resume.
    """
    if len(set(names)) > 1:
        found = ", ".join(f"rank {rank}: {name or 'none'}" for rank, name in enumerate(names[:8]))
        raise UserError(
            f"the processes find different checkpoints ({found})",
            code="resume-other-checkpoints",
            where=str(run),
            hint="all machines must see the same output folder, for example on a network drive",
        )


def warnings(checkpoint: Path, *, processes: int, stage: int) -> list[str]:
    """Return warnings about differences from an uninterrupted run.

    Raises UserError if the optimizer state cannot be restored: HF's Trainer would silently use a new optimizer, and
    DeepSpeed needs as many processes as wrote its shards. `stage` is the ZeRO stage, 0 without DeepSpeed; 1 counts as
    2.
    """
    stage = 2 if stage == 1 else stage
    wrote, before = num_processes(checkpoint), zero_stage(checkpoint)
    if before != stage:
        raise UserError(
            f"the checkpoint was written {_with(before)}; this run is {_with(stage)} and cannot restore the optimizer",
            code="resume-other-zero-stage",
            where=str(checkpoint),
            hint=f"to resume:  {f'--deepspeed zero{before}' if before else 'remove --deepspeed'}",
        )
    if wrote == processes:
        return []
    if stage:
        raise UserError(
            f"the optimizer state has one part for each of {wrote} processes, and this run has {processes}",
            code="resume-other-processes",
            where=str(checkpoint),
            hint=f"to resume:  torchrun --nproc_per_node {wrote} ...",
        )
    return [
        f"{checkpoint.name} was written with {wrote} processes, now there are {processes}: the random states are "
        "initialized again, so dropout differs from an uninterrupted run"
    ]


def _with(stage: int) -> str:
    return f"with ZeRO-{stage}" if stage else "without DeepSpeed"
