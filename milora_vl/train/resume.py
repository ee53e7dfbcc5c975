"""What a run continues: its folder, the run that it resumes, what may change then, and the runs that it comes after.

The optimizer, the schedule and the factors come from the checkpoint: only the keys of MAY_CHANGE differ.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

import torch

from milora_data.check import KEY_BYTES, RunData, picture_files, source_text
from milora_data.records.record import Record
from milora_vl.common import atomic_write
from milora_vl.common.cli.console import amount, command_line
from milora_vl.common.cli.screen import Screen
from milora_vl.common.errors import Key, UserError, require_folder
from milora_vl.core.adapter import folders
from milora_vl.core.adapter.fixed_a import Protection, protected_directions
from milora_vl.core.adapter.folders import (
    HELD_OUT,
    is_of_fsdp,
    is_sharded,
    module_path,
    num_processes,
    recipe_of_run,
    step_of,
    zero_stage,
)
from milora_vl.core.adapter.sidecar import Sidecar, read_sidecar
from milora_vl.core.calibration.texts import SEED
from milora_vl.core.policy import Target
from milora_vl.train.data import read_records
from milora_vl.train.join_settings import to_merge
from milora_vl.train.settings import Changes, DataConfig, Recipe, differences, load_recipe, value_of

ENVIRONMENT, CARD = "environment.json", "README.md"  # shared with others, so secrets in them are hidden
OWN_FILES = ("recipe.yaml", CARD, "policy.json", "report.html", HELD_OUT)

Entry = Mapping[str, Any]  # the entry of a run that others come after, in their milora.json


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


def choose_folder(path: Path, resume: str | None) -> RunFolder:
    """Return the folder of the run, for `--resume_from_checkpoint` (None, true, auto, or a folder)."""
    require_folder(path)
    wanted = folders.asked_for(resume)
    if wanted is None:
        refuse_to_overwrite(path)
        return RunFolder(path)
    if not folders.is_word(wanted):
        chosen = _require_complete(Path(wanted))
        is_new = chosen.resolve().parent != path.resolve()
        if is_new:
            refuse_to_overwrite(path)
        return RunFolder(path, chosen, is_new=is_new)
    checkpoint, skipped = folders.latest(path)
    if checkpoint is None and wanted.lower() != "auto":
        reasons = [f"{folder.name}: {reason}" for folder, reason in skipped] or ["the folder has no checkpoint"]
        message = "nothing to resume from\n" + "\n".join(reasons)
        hint = "remove --resume_from_checkpoint to start, or use auto to resume only if there is a checkpoint"
        raise UserError(message, code="resume-no-checkpoint", where=str(path), hint=hint)
    # Weights of a run that was killed before its first complete checkpoint are overwritten.
    restarts = bool(skipped) or (folders.holds_weights(path) and bool(folders.read_environment(path)))
    is_new = checkpoint is None and not restarts
    if is_new:
        refuse_to_overwrite(path)
    return RunFolder(path, checkpoint, tuple(skipped), is_new)


def refuse_to_overwrite(path: Path) -> None:
    """Raise UserError for a folder that holds a run, or files of somebody else under the names of a run's files."""
    weights = [name for name in folders.WEIGHTS if (path / name).is_file()]
    steps = [folder.name for folder in folders.checkpoints(path)]
    foreign = [name for name in OWN_FILES if (path / name).exists()]
    if weights:
        kind = "a finished run" if folders.is_finished(path) else "trained weights"
        message, code = f"the folder holds {kind} ({weights[0]}); nothing is overwritten", "run-exists"
        hint = f"use another --output_dir, or remove the folder\nsee it: python -m milora_vl.report {path}"
    elif steps:
        message = f"the folder holds {amount(len(steps), 'checkpoint')} ({steps[-1]}) of an unfinished run"
        code, hint = "run-unfinished", "to continue it:       --resume_from_checkpoint true\n"
        hint += "to start a new run:   another --output_dir, or remove the folder"
    elif foreign and not folders.read_environment(path):
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
    if reason := folders.why_incomplete(folder):
        hint = "use another checkpoint, or  --resume_from_checkpoint auto  for the newest complete one"
        raise UserError(f"cannot resume from {folder}: {reason}", where=where, hint=hint)
    return folder


# Paths, logging, saving, speed, and what is compared elsewhere: the records, the steps, and the batch in total.
MAY_CHANGE = re.compile(
    r"factor_cache|attn_implementation|calibration\.(data|image_folder)|data\.(path|image_folder)"
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


@dataclass(frozen=True, slots=True)
class ResumedRun:
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


def read_resumed(
    run: RunFolder, resume: str | None, recipe_on: Callable[[str], Recipe], dtype: str, processes: int
) -> ResumedRun | None:
    """Return the run that `--resume_from_checkpoint` continues in this folder, None if a new run starts.

    `recipe_on` is the new recipe on the base model of the earlier run. Raises UserError without a recipe to compare
    with, and for a recipe that differs in more than free keys.
    """
    is_finished = (resume or "").lower() == "auto" and folders.is_finished(run.path)
    if run.checkpoint is None and not is_finished:
        return None
    folder = run.path if run.checkpoint is None else run.checkpoint.parent
    name = str(run.checkpoint or folder)
    if not (folder / "recipe.yaml").is_file():
        message = "there is no recipe.yaml beside it, so its learning rates, data and template are unknown"
        hint = f"copy the run's recipe.yaml into {folder}"
        raise UserError(message, code="resume-no-recipe", where=name, hint=hint)
    before, environment = load_recipe(folder / "recipe.yaml"), folders.read_environment(folder)
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
    refused = {key: values for key, values in changes.items() if not may_change(key, recipe)}
    if refused:
        lines = "\n".join(
            f"  {key}: trained with {shown_value(old)}, now {shown_value(new)}" for key, (old, new) in refused.items()
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
    earlier = ResumedRun(folder, run.checkpoint, is_finished, before, environment, changes)
    if earlier.gets_steps and run.checkpoint is None:
        message = "the run is finished, and it has no checkpoint to continue from"
        raise UserError(message, code="resume-no-checkpoint", where=str(folder), hint=NEW_RUN)
    return earlier


def may_change(key: str, recipe: Recipe) -> bool:
    by_evaluation = recipe.train.get("lr_scheduler_type") in SCHEDULES_BY_EVALUATION
    if OF_EVALUATION.fullmatch(key):
        return not (by_evaluation or recipe.train.get("load_best_model_at_end"))
    return MAY_CHANGE.fullmatch(key) is not None and not (recipe.data.streaming and OF_STREAM.fullmatch(key))


def schedule_has_end(recipe: Recipe) -> bool:
    """Return whether the learning rate of a step depends on the total number of steps."""
    schedule, warmup = (value_of(recipe.train, name) for name in ("lr_scheduler_type", "warmup_steps"))
    is_share = 0 < warmup < 1 and schedule in ("constant_with_warmup", "inverse_sqrt")
    return is_share or schedule not in SCHEDULES_WITHOUT_END


def shown_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _batch(recipe: Recipe, processes: int) -> tuple[int, int, int]:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    per_device, accumulation = (value_of(recipe.train, name) for name in names)
    return per_device, accumulation, processes


def environment_resumed(earlier: ResumedRun, run: RunFolder, environment: dict[str, Any]) -> dict[str, Any]:
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


# What a resumed run needs beside its checkpoint, which holds A and its protection. These files describe private data
# and pictures, so they stay here: HF's Trainer pushes no name with an underscore.
TEXTS, RECORDS = "_start/texts.json", "_start/records.json"


def read_start(folder: Path, name: str) -> dict[str, Any]:
    """Return what the start of the run in `folder` has written. Raises UserError if it is missing or damaged."""
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        hint = f"copy it from the folder of the run\n{NEW_RUN}"
        raise UserError("a file of the run is missing or damaged", where=str(folder / name), hint=hint) from None


def records_content(data: RunData) -> dict[str, str]:
    """Return the content of the file RECORDS."""
    return {"records": data.keys.hex(), "pictures": data.picture_keys.hex(), "held_out": data.held_out_keys.hex()}


def require_same_records(folder: Path, data: RunData, recipe: Recipe) -> list[str]:
    """Return warnings about other held-out records that change no step, and about what a stream leaves unchecked.

    Raises UserError with the first record or picture that differs from those that the run in `folder` had.
    """
    before = read_start(folder, RECORDS)
    require_same("records", before["records"], data.keys, lambda number: data.train[number].source)
    require_same("pictures", before["pictures"], data.picture_keys, lambda number: picture_files(data.train)[number])
    held_out, warnings = data.evaluation or (), list[str]()
    names = lambda: [*(record.source for record in held_out), *picture_files(held_out)]  # noqa: E731
    try:
        if before["held_out"] and data.held_out_keys:
            require_same("held-out data", before["held_out"], data.held_out_keys, lambda number: names()[number])
    except UserError as error:
        if not may_change("data.eval_path", recipe):
            raise
        warnings = [f"{error.first.where}: {error.first.message}; held-out losses before and after are not comparable"]
    unread = f"of the stream, only the first {len(data.train):,} records and pictures were compared with the run's"
    return [*warnings, *([unread] if data.streamed else [])]


def require_same(what: str, before: str, now: bytes, name: Callable[[int], object]) -> None:
    """Raise UserError if keys differ from those of the run, in hex; `name` returns the name of a key's owner."""
    old = bytes.fromhex(before)
    had, have = len(old) // KEY_BYTES, len(now) // KEY_BYTES
    for number in range(max(had, have)):
        of_key = slice(KEY_BYTES * number, KEY_BYTES * (number + 1))
        if old[of_key] != now[of_key]:
            message = f"this is the first of the {what} that differ from those of the run"
            message += f"; it had {had:,}, now there are {have:,}" if had != have else ""
            where = str(name(number) if number < have else "the end")
            hint = f"to resume:           restore it\n{NEW_RUN}"
            raise UserError(message, code="resume-other-data", where=where, hint=hint)


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


def resume_warnings(checkpoint: Path, *, processes: int, stage: int, fsdp: bool = False) -> list[str]:
    stage = 2 if stage == 1 else stage
    wrote, before = num_processes(checkpoint), zero_stage(checkpoint)
    old, new = (f"with ZeRO-{one}" if one else "without DeepSpeed" for one in (before, stage))
    if before != stage:
        message = f"the checkpoint was written {old}; this run is {new} and cannot restore the optimizer"
        hint = f"to resume:  {f'--deepspeed zero{before}' if before else 'remove --deepspeed'}"
        raise UserError(message, where=str(checkpoint), hint=hint)
    if fsdp and not is_of_fsdp(checkpoint):
        message = "the checkpoint was written without FSDP2; this run is with FSDP2 and cannot restore the optimizer"
        raise UserError(message, where=str(checkpoint), hint="to resume:  remove --fsdp")
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


def tasks_before(
    recipe: Recipe, targets: Sequence[Target], checkpoint: Path | None
) -> tuple[tuple[Entry, ...], list[str]]:
    """Return the entries of the tasks that a run comes after, in order, and warnings.

    A resumed run has them in its checkpoint. Raises UserError for rules that cannot train after these tasks.
    """
    if recipe.after is None:
        return (), []
    if checkpoint is not None:
        saved = read_sidecar(checkpoint)
        return (() if saved is None else tuple(saved.tasks[:-1])), []
    after, warnings = Path(recipe.after), list[str]()
    saved = read_sidecar(after)
    assert saved is not None
    _require_rules(recipe, saved, targets)
    tasks = saved.tasks
    if not tasks:  # that run came after none; an adapter without a recipe has the template of this run
        of_run = folders.read_environment
        environment = of_run(after) or of_run(after.parent)  # of a checkpoint
        content = {"template": recipe.template, **recipe_of_run(after)}
        tasks = [task_entry(after, Recipe.parse(content), saved.targets, saved.protection, environment)]
    if not any(target.protect for target in targets):
        warnings.append("no rule has protect: what the earlier runs have learned is not protected (--protect 0.95)")
    return tuple(tasks), warnings


def _require_rules(recipe: Recipe, saved: Sidecar, targets: Sequence[Target]) -> None:
    """Raise UserError for targets whose update cannot be added to the update of the run of `saved`."""
    if found := [target.path for target in (*saved.targets, *targets) if target.method == "dora"]:
        message = f"DoRA scales the rows of a weight, so its update cannot be added to another one: {found[0]}"
        raise UserError(
            message,
            where=Key.of("after"),
            hint=f"use another method, or merge first:\n{to_merge(Path(str(recipe.after)))}",
        )
    in_full = [number for number, rule in enumerate(recipe.policy or ()) if rule.get("method") == "full"]
    where = Key(("policy", in_full[0], "method")) if in_full else Key.of("policy")
    if all(target.rank is None for target in targets):
        message = "the rules train weights in full, which changes what the earlier runs have learned"
        raise UserError(message, where=where, hint="train adapters, for example  --method milora")
    before = [target.path for target in saved.targets]
    for path in [target.path for target in targets if target.rank is None]:
        if module_path(path, before) or any(module_path(other, [path]) for other in before):
            message = f"{path} would train in full, but an earlier run has trained it: the new weight would replace it"
            hint = "give it an adapter, or leave its rule out; without a policy the run takes the earlier one's"
            raise UserError(message, where=where, hint=hint)


@dataclass(frozen=True, slots=True)
class EarlierRecords:
    """The records of earlier tasks: the recipe to collate by, records, and a random order of them."""

    found: tuple[tuple[Recipe, Sequence[Record], Sequence[int]], ...]


def read_earlier_records(tasks: Sequence[Entry], recipe: Recipe, screen: Screen, *, are_used: bool) -> EarlierRecords:
    """Read the records of earlier tasks if the run uses them, each data set once.

    Raises UserError where they are missing, unreadable or changed.
    """
    read_of: dict[str, tuple[Entry, DataConfig, Sequence[Record]]] = {}
    for task in tasks if are_used else ():
        data, read = _records_of(task, recipe, screen)
        read_of[str(data)] = task, data, read.train
    found = []
    for task, data, records in read_of.values():
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(SEED)).tolist()
        found.append((recipe.model_copy(update={"template": task["template"], "data": data}), records, order))
    return EarlierRecords(tuple(found))


def _records_of(task: Entry, recipe: Recipe, screen: Screen) -> tuple[DataConfig, RunData]:
    """Read the records of a task: those with its fingerprint, in its text and in its pictures."""
    data = DataConfig.model_validate({**task["data"], "eval_path": None})
    if recipe.data.bad_images != "raise":
        data = data.model_copy(update={"bad_images": recipe.data.bad_images})
    name = source_text(data.path)
    try:
        with screen.step(f"reading the records of {task['run']} in {name}"):
            read = read_records(data)
    except UserError as error:
        raise _records_missing(task, str(error.first).splitlines()[0]) from None
    if task["fingerprint"] not in ("", read.fingerprint):
        raise _records_missing(task, f"{name} has other records")
    if task.get("pictures", "") not in ("", read.pictures):
        raise _records_missing(task, f"the pictures in {data.image_folder} are others")
    return data, read


def task_entry(
    run: Path,
    recipe: Recipe,
    targets: Sequence[Target],
    protection: Mapping[str, Protection],
    records: RunData | Mapping[str, Any],
) -> Entry:
    """Return the entry of a task, on records or on what environment.json of its run says about them."""
    if isinstance(records, RunData):
        records = {"data": records.counts(), "records": records.fingerprint, "pictures": records.pictures}
    rules = Counter((target.tower, target.method, target.rank, target.protect) for target in targets)
    return {
        "run": str(run),
        "template": recipe.template,
        "records": records.get("data", {}).get("train"),
        "fingerprint": records.get("records", ""),
        "pictures": records.get("pictures", ""),
        "data": recipe.data.model_dump(exclude_defaults=True),
        "eval": recipe.eval.model_dump(exclude_defaults=True),
        "rules": [
            {"tower": tower, "method": method, "rank": rank, "protect": protect, "modules": count}
            for (tower, method, rank, protect), count in rules.items()
        ],
        "directions": protected_directions(targets, protection),
    }


def _records_missing(task: Entry, why: str) -> UserError:
    message = f"the records of {task['run']} are needed to protect what it has learned: {why}"
    return UserError(message, where=Key.of("after"), hint="put them back, and start where that run was started")
