"""Check that a run can resume from a checkpoint: recipe, records, steps, processes, ZeRO stage.

The optimizer, the schedule and the factors come from the checkpoint, not from the flags. Two recipes may differ in the
keys of FREE alone: with another difference, the files of the run would describe a different training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

from milora_vl.common.cli.console import command_line
from milora_vl.common.errors import UserError
from milora_vl.common.strict_models import Strict
from milora_vl.core.adapter import checkpoints
from milora_vl.core.adapter.checkpoints import is_sharded, num_processes, step_of, zero_stage
from milora_vl.core.policy import Policy
from milora_vl.train import arguments
from milora_vl.train.arguments import value_of
from milora_vl.train.data import RunData
from milora_vl.train.folder import RunFolder
from milora_vl.train.recipe import Recipe, load

# Paths, logging, saving, speed, and what is compared elsewhere: the records, the steps, and the batch in total.
FREE = re.compile(
    r"factor_cache|attn_implementation|calibration\.(image_folder|earlier)|data\.(path|image_folder)"
    r"|(sweep|eval)\..+"
    r"|train\.(learning_rate|weight_decay|max_steps|num_train_epochs|gradient_accumulation_steps|disable_tqdm|run_name"
    r"|(activation_checkpointing|logging_|log_|save_total|save_on|save_only|hub_|push_|report_|dataloader_[npm]"
    r"|dataloader_persistent|ddp_|deepspeed|fsdp|torch_|use_|liger_|per_device_|project|trackio|do_|include_|debug"
    r"|enable_jit|restore_callback|skip_memory|batch_eval|eval_accumulation|eval_do|eval_use|length_column).*)"
)
# Free unless evaluations choose the best checkpoint or set the learning rate.
OF_EVALUATION = re.compile(r"data\.eval_path|eval\.suite_.*|train\.(eval_.*|save_.*|metric_.*|greater_.*|.*_full_eval)")
# Not free for a stream, whose records have no fingerprint, and which is divided among processes.
OF_STREAM = re.compile(r"data\.path|train\.(per_device_train_batch_size|dataloader_num_workers)")
# Schedules whose rates do not depend on the last step, unless the warm-up is a share of all steps.
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
SCHEDULES_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
NEW_RUN = "to start a new run:  another --output_dir, without --resume_from_checkpoint"
Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Earlier:
    """The run that a command resumes, as its folder holds it, and the free keys that have changed since."""

    folder: Path
    checkpoint: Path | None  # None: the run is finished and has none
    is_finished: bool  # --resume_from_checkpoint auto finds it at its end
    recipe: Recipe
    environment: Mapping[str, Any]
    changes: Changes

    @property
    def gets_steps(self) -> bool:
        return not self.is_finished or bool({"train.max_steps", "train.num_train_epochs"} & self.changes.keys())


def read_earlier(
    run: RunFolder, resume: str | None, recipe_on: Callable[[str], Recipe], dtype: str, processes: int
) -> Earlier | None:
    """Return the run that `--resume_from_checkpoint` continues in this folder, None if a new run starts.

    `recipe_on` is the new recipe on the base model of the earlier run. Raises UserError without a recipe to compare
    with, and for a recipe that differs in more than free keys.
    """
    is_finished = (resume or "").lower() == "auto" and checkpoints.is_finished(run.path)
    if run.checkpoint is None and not is_finished:
        return None
    folder = run.path if run.checkpoint is None else run.checkpoint.parent
    name = str(run.checkpoint or folder)
    if not (folder / "recipe.yaml").is_file():
        message = "there is no recipe.yaml beside it, so its learning rates, data and template are unknown"
        hint = f"copy the run's recipe.yaml into {folder}"
        raise UserError(message, code="resume-no-recipe", where=name, hint=hint)
    before, environment = load(folder / "recipe.yaml"), checkpoints.read_environment(folder)
    recipe = recipe_on(before.model)
    # `warnings` compares the processes of a sharded checkpoint.
    checkpoint = run.checkpoint
    wrote = processes if checkpoint is None or is_sharded(checkpoint) else num_processes(checkpoint)
    changes = differences(before, recipe)
    if (old := environment.get("dtype", dtype)) != dtype:
        changes["dtype"] = (old, dtype)
    batches = [_batch(side, count) for side, count in ((before, wrote), (recipe, processes))]
    if prod(batches[0]) != prod(batches[1]) or (recipe.data.streaming and wrote != processes):
        old, new = (f"{prod(batch)} ({' x '.join(map(str, batch))})" for batch in batches)
        changes["batch in total"] = old, new
    refused = {key: values for key, values in changes.items() if not is_free(key, recipe)}
    if refused:
        lines = "\n".join(
            f"  {key}: trained with {shown(old)}, now {shown(new)}" for key, (old, new) in refused.items()
        )
        command = command_line(
            "milora_vl.train", "--recipe", folder, "--output_dir", folder, "--resume_from_checkpoint", "true"
        )
        if wrote > 1:
            command = command.replace("python", f"torchrun --nproc_per_node {wrote}", 1)
        raise UserError(
            f"{name} was trained with other settings and cannot continue with these:\n{lines}",
            hint=f"to resume:           repeat the old values; {folder / 'recipe.yaml'} holds all of them:\n"
            f"                     {command}\n{NEW_RUN}",
        )
    earlier = Earlier(folder, run.checkpoint, is_finished, before, environment, changes)
    if earlier.gets_steps and run.checkpoint is None:
        message = "the run is finished, and it has no checkpoint to continue from"
        raise UserError(message, code="resume-no-checkpoint", where=str(folder), hint=NEW_RUN)
    return earlier


def differences(before: Recipe, now: Recipe) -> Changes:
    """Return the keys whose values differ, with both values, in the order of a recipe."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def is_free(key: str, recipe: Recipe) -> bool:
    by_evaluation = recipe.train.get("lr_scheduler_type") in SCHEDULES_BY_EVALUATION
    if OF_EVALUATION.fullmatch(key):
        return not (by_evaluation or recipe.train.get("load_best_model_at_end"))
    return FREE.fullmatch(key) is not None and not (recipe.data.streaming and OF_STREAM.fullmatch(key))


def schedule_has_end(recipe: Recipe) -> bool:
    """Return whether the learning rate of a step depends on the total number of steps."""
    schedule, warmup = (value_of(recipe.train, name) for name in ("lr_scheduler_type", "warmup_steps"))
    is_share = 0 < warmup < 1 and schedule in ("constant_with_warmup", "inverse_sqrt")
    return is_share or schedule not in SCHEDULES_WITHOUT_END


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _batch(recipe: Recipe, processes: int) -> tuple[int, int, int]:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    per_device, accumulation = (value_of(recipe.train, name) for name in names)
    return per_device, accumulation, processes


def _flat(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield all keys of a recipe with their values; training arguments include defaults, rules the rates of the run."""
    autocast = arguments.AUTOCAST.get(recipe.dtype)
    train = {name: True for name in (autocast,) if name} | {k: v for k, v in recipe.train.items() if v is not None}
    for number, rule in enumerate(Policy.parse(list(recipe.policy)).rules if recipe.policy else ()):
        in_force = {"weight_decay": value_of(train, "weight_decay")} | rule.in_force()
        in_force.setdefault("learning_rate", arguments.default_rate(train, rule.method))
        yield from ((f"policy[{number}].{name}", value) for name, value in in_force.items())
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if isinstance(value, Strict):
            yield from ((f"{name}.{inner}", entry) for inner, entry in value.model_dump().items())
        elif name not in ("train", "policy", "dtype"):  # the dtype that `auto` means is compared
            yield name, value
    for name in arguments.known():
        if name not in arguments.RENAMED and name not in arguments.REFUSED:
            yield f"train.{name}", value_of(train, name)


def continued(earlier: Earlier, run: RunFolder, environment: dict[str, Any]) -> dict[str, Any]:
    """Return environment.json of a resumed run: it keeps command and start time, adds times, and lists every resume."""
    assert earlier.checkpoint is not None
    known, legs = earlier.environment, earlier.environment.get("resumed", [])
    began = legs[-1]["at"] if legs else known.get("started", environment["started"])
    saved = (earlier.checkpoint / "trainer_state.json").stat().st_mtime
    # A run that was killed has written no time: what it took up to the checkpoint counts.
    killed = known.get("seconds_of_earlier", 0.0) + max(saved - datetime.fromisoformat(began).timestamp(), 0.0)
    is_same_run = earlier.folder.resolve() == run.path.resolve()
    source = earlier.checkpoint.name if is_same_run else str(earlier.checkpoint)
    entry: dict[str, Any] = {"from": source, "at": environment["started"], "command": environment["command"]}
    if earlier.changes:
        entry["changed"] = {key: list(values) for key, values in earlier.changes.items()}
    before = known.get("seconds_before_training", 0.0) + environment["seconds_before_training"]
    kept = {name: known.get(name, environment[name]) for name in ("started", "command")}
    times = {"seconds_before_training": before, "seconds_of_earlier": round(known.get("seconds") or killed, 1)}
    return {**environment, **kept, **times, "resumed": [*legs, entry]}


def require_same_records(earlier: Earlier, data: RunData) -> list[str]:
    """Return a warning about what a stream leaves unchecked.

    Raises UserError if the records, their order or their pictures differ from those that the run was trained on.
    """
    count, path = data.counts().get("train"), earlier.recipe.data.path
    before = earlier.environment.get("data", {}).get("train", count)
    where, what, numbers = (f" ({path})" if isinstance(path, str) else ""), "records", ""
    if before != count:
        numbers = f": it had {before:,}, now there are {count:,}"
    elif earlier.environment.get("records", data.fingerprint) == data.fingerprint:
        if earlier.environment.get("pictures", data.pictures) == data.pictures:
            unread = (
                f"of the stream, only the first {len(data.train):,} records and pictures were compared with the run's"
            )
            return [unread] if data.streamed else []
        what, where = "pictures", f" ({earlier.recipe.data.image_folder})"
    raise UserError(
        f"these are not the {what} that {earlier.checkpoint or earlier.folder} was trained on{numbers}",
        code="resume-other-data",
        hint=f"to resume:           restore the old {what}{where}\n{NEW_RUN}",
    )


def require_same_steps(checkpoint: Path, recipe: Recipe, steps: int) -> None:
    """Raise UserError if the run ends before its checkpoint, or if its schedule depends on a changed last step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # `choose` has read it
    planned = state.get("max_steps", steps)
    if planned != steps and schedule_has_end(recipe):
        raise UserError(
            f"the checkpoint belongs to a run of {planned:,} steps, this run has {steps:,}; the learning rates of the "
            f"{value_of(recipe.train, 'lr_scheduler_type')} schedule depend on the last step",
            where=str(checkpoint),
            hint=f"to resume:           --max_steps {planned}\n{NEW_RUN}",
        )
    if step_of(checkpoint) > steps:
        message = f"the checkpoint is beyond the end of this run, step {steps:,}"
        hint = "increase --max_steps or --num_train_epochs to continue from it"
        raise UserError(message, code="resume-beyond-end", where=str(checkpoint), hint=hint)


def require_same_checkpoint(run: Path, names: Sequence[str | None]) -> None:
    """Raise UserError if processes would resume from different checkpoints; `names` has one for each rank.

    A machine that does not see the output folder of the first one would start again while the others resume.
    """
    if len(set(names)) > 1:
        found = ", ".join(f"rank {rank}: {name or 'none'}" for rank, name in enumerate(names[:8]))
        message, hint = f"the processes find different checkpoints ({found})", "all machines must see the same folder"
        raise UserError(message, code="resume-other-checkpoints", where=str(run), hint=hint)


def warnings(checkpoint: Path, *, processes: int, stage: int) -> list[str]:
    stage = 2 if stage == 1 else stage
    wrote, before = num_processes(checkpoint), zero_stage(checkpoint)
    old, new = (f"with ZeRO-{one}" if one else "without DeepSpeed" for one in (before, stage))
    if before != stage:
        message = f"the checkpoint was written {old}; this run is {new} and cannot restore the optimizer"
        hint = f"to resume:  {f'--deepspeed zero{before}' if before else 'remove --deepspeed'}"
        raise UserError(message, where=str(checkpoint), hint=hint)
    if wrote == processes:
        return []
    if stage:
        message = f"the optimizer state has one part for each of {wrote} processes, and this run has {processes}"
        hint = f"to resume:  torchrun --nproc_per_node {wrote} ..."
        raise UserError(message, where=str(checkpoint), hint=hint)
    return [
        f"{checkpoint.name} was written with {wrote} processes, now there are {processes}: the random states are "
        "initialized again, so dropout differs from an uninterrupted run"
    ]
