"""`--adapter FOLDER` and `--after FOLDER`: what a run takes from an adapter or an earlier run, and what must agree.

With `--adapter` the adapter trains further: it decides what trains and on which base. The data, the schedule and the
rates come from the new run. With `--after` a new adapter trains on the sum, by the same rules unless others are set.

milora.json of a run lists all tasks in order, the run's own last. An entry holds what is needed to read its records:

    {"run": "runs/a", "template": "vicuna_v1", "records": 1200, "fingerprint": "4f0c...", "pictures": "77a1...",
     "data": {"path": "a.json", "image_folder": "pictures", "eval_path": "held_out.json"},   # keys that are set
     "eval": {"suites": ["emoji"], "data": "questions"},                                     # the same
     "rules": [{"tower": "language", "method": "milora", "rank": 64, "protect": 0.95, "modules": 224}],
     "directions": {"language": 0.268}}   # share of the input directions that the run protected, mean over the layers
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_data.records.record import Record
from milora_vl.common.cli.console import command_line
from milora_vl.common.cli.screen import Screen
from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.core.adapter.checkpoints import read_environment
from milora_vl.core.adapter.fixed_a import Protection
from milora_vl.core.adapter.folders import (
    base_of,
    from_there,
    has_config,
    holds_llava_adapter,
    holds_projector_alone,
    module_path,
    require_adapter,
)
from milora_vl.core.adapter.sidecar import FILE_NAME, read_sidecar, require_layers, require_trainable
from milora_vl.core.calibration.texts import SEED
from milora_vl.core.policy import Rule, Target
from milora_vl.core.policy.rules import METHODS
from milora_vl.models.prompts import recipe_of_run
from milora_vl.train.data import RunData, read_records, source_text
from milora_vl.train.flags import PolicyEdits, edited
from milora_vl.train.recipe import DataConfig, Recipe, SourceConfig
from milora_vl.train.resume import differences
from milora_vl.train.screen import protected_directions

# The keys of a recipe that describe a model and its inputs. The keys of FIXED are parts of the adapter itself.
FIXED = ("template", "calibration")
TAKEN = (
    "model", "parts", "projector_weights", "quantization", "quant_type", "double_quant", "dtype",
    "attn_implementation", "policy", *FIXED,
)  # fmt: skip
OF_SECTIONS = {
    "data": (
        "max_length", "image_aspect_ratio", "min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "fps",
        "num_frames",
    ),
    "train": ("bf16", "fp16"),
}  # fmt: skip
RATES = ("learning_rate", "weight_decay")


def settings_of(folder: Path, flag: str = "--adapter") -> dict[str, Any]:
    """Return the settings of the adapter in `folder`, as a recipe: of its run, or what its own files say."""
    if flag == "--after" and (folder / "config.json").is_file() and not has_config(folder):
        message, hint = f"{folder} holds a whole model, without an adapter", f"train on it as a base:  --model {folder}"
        raise UserError(message, code="adapter-missing", where=flag, hint=hint)
    require_adapter(folder, flag, "milora_vl.train", flag)
    if holds_projector_alone(folder):
        message, hint = f"{folder} holds a projector alone", f"use  --projector_weights {folder}"
        raise UserError(message, code="adapter-missing", where=flag, hint=hint)
    is_other = holds_llava_adapter(folder)
    sidecar = None if is_other else read_sidecar(folder)
    if sidecar is None:
        why = "is in the layout of another program" if is_other else f"has no {FILE_NAME}, which lists what trains"
        raise UserError(f"{folder} {why}", where=flag, hint=to_merge(folder))
    require_trainable(folder, sidecar, is_trainable=flag == "--adapter")
    run = recipe_of_run(folder)
    if not run.get("policy"):  # saved in Python
        rules = [_rule_of(target) for target in sidecar.targets]
        return {"model": base_of(folder), "policy": rules}
    run["model"] = from_there(folder, str(run.get("model") or base_of(folder)))
    return {**{name: value for name, value in run.items() if name in TAKEN}, **_of_sections(run)}


def _of_sections(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        section: {name: value for name, value in run.get(section, {}).items() if name in names}
        for section, names in OF_SECTIONS.items()
    }


def settings_after(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that a run takes from the run in `folder`, whose update it keeps, and notes.

    A module that trained in full gets an adapter like the others. Rules without protection get the default method.
    Raises UserError as `settings_of`.
    """
    settings = settings_of(folder, "--after")
    if calibration := settings.get("calibration"):
        kept = {name: value for name, value in calibration.items() if name != "earlier"}
        settings["calibration"] = kept if kept.get("data") else {**kept, "image_folder": None}
    rules = [Rule.model_validate(rule) for rule in settings["policy"]]
    adapter = next(rule for rule in rules if rule.method not in (None, "full", "frozen"))
    settings["policy"] = [
        {**(adapter if rule.method == "full" else rule).model_dump(exclude_none=True), "modules": rule.modules}
        for rule in rules
    ]
    if any(rule.in_force().get("protect") for rule in rules):
        return settings, []
    settings["policy"] = edited(settings["policy"], PolicyEdits(method="milora"))
    note = (
        f"note: {folder} was trained without protection, so it has moved what the base knew already; without other "
        "rules this run trains with method milora and protects what is left"
    )
    return settings, [note]


def settings_resumed(run: Path) -> dict[str, Any]:
    recipe = recipe_of_run(run)
    return {name: value for name, value in recipe.items() if name in TAKEN} | _of_sections(recipe)


def _rule_of(target: Target) -> dict[str, Any]:
    """Return a rule for the module of a target.

    >>> _rule_of(Target(path="lm.q", shape=(4, 4), tower="language", method="lora", rank=2, alpha=2.0))
    {'modules': 'lm.q', 'method': 'lora', 'rank': 2, 'alpha': 2.0}
    """
    share = METHODS[target.method].protect
    defaults = Target(path="", shape=(), tower=None, method=target.method, protect=share).to_dict()
    fields = {name: value for name, value in target.to_dict().items() if value != defaults[name]}
    rule = {name: value for name, value in fields.items() if name not in ("path", "shape", "tower")}
    return {"modules": target.path, "method": target.method, **rule}


def contradictions(adapter: str, settings: Mapping[str, Any], recipe: Recipe) -> list[Problem]:
    """Return the problem of a recipe that contradicts the adapter's `settings`; other rates do not."""
    found: dict[tuple[str | int, ...], str] = {}
    for key, (has, got) in differences(Recipe.parse(settings), recipe).items():
        parts = tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", key))
        if parts[0] in ("policy", *FIXED) and parts[0] in settings and parts[-1] not in RATES:
            found[parts] = f"  {key}: it has {has}, got {got}"
    if not found:
        return []
    lines, hint = "\n".join(found.values()), "remove the setting, or train on the merged model:"
    message = f"contradicts the adapter {adapter}:\n{lines}"
    where = Key(next(iter(found)))
    return [Problem(message, "adapter-other-settings", where, f"{hint}\n{to_merge(Path(adapter))}")]


def to_merge(adapter: Path) -> str:
    command = command_line("milora_vl.export", adapter, "--to", "merged", "--output_dir", "MERGED")
    return f"{command}\nthen  --model MERGED"


HINT = "name similar records in the recipe:  calibration: {earlier: FILE, image_folder: FOLDER}"

Task = Mapping[str, Any]


def tasks_before(
    recipe: Recipe, base: nn.Module, targets: Sequence[Target], checkpoint: Path | None
) -> tuple[tuple[Task, ...], list[str]]:
    """Return the entries of the tasks that a run on `base`, without weights, comes after, in order, and warnings.

    A resumed run has them in its checkpoint. Raises UserError for rules that cannot train after these tasks, and for a
    base with other layers.
    """
    if recipe.after is None:
        return (), []
    if checkpoint is not None:
        saved = read_sidecar(checkpoint)
        return (() if saved is None else tuple(saved.tasks[:-1])), []
    _require_rules(recipe, Path(recipe.after), base, targets)
    tasks, warnings = _tasks_of(Path(recipe.after), recipe.template), []
    if not any(target.protect for target in targets):
        warnings.append("no rule has protect: what the earlier runs have learned is not protected (--protect 0.95)")
    return tuple(tasks), warnings


@dataclass(frozen=True, slots=True)
class EarlierRecords:
    """The entries of earlier tasks, with the places where their records are now; and these, in random order."""

    tasks: tuple[Task, ...]
    found: tuple[tuple[Recipe, Sequence[Record], Sequence[int]], ...]  # the recipe to collate by, records, their order


def read_earlier_records(tasks: Sequence[Task], recipe: Recipe, screen: Screen, *, are_used: bool) -> EarlierRecords:
    """Read the records of earlier tasks if the run uses them, those in one place once.

    Those of `calibration.earlier` replace records that are missing, unreadable or changed. Raises UserError where there
    are none.
    """
    if not tasks or not are_used:
        return EarlierRecords(tuple(tasks), ())
    read = [_read(task, recipe, screen) for task in tasks]
    if recipe.calibration.earlier is not None and all(task == now for task, (now, *_) in zip(tasks, read, strict=True)):
        screen.warn("calibration.earlier has no effect: the records of all earlier runs are in place")
    places = {str(data): (task, data, records) for task, data, records in read}
    found = []
    for task, data, records in places.values():
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(SEED)).tolist()
        found.append((recipe.model_copy(update={"template": task["template"], "data": data}), records, order))
    return EarlierRecords(tuple(task for task, *_ in read), tuple(found))


def _read(task: Task, recipe: Recipe, screen: Screen) -> tuple[Task, DataConfig, Sequence[Record]]:
    """Return a task, where its records are, and the records; a task whose records are others has their place."""
    run, calibration = task["run"], recipe.calibration
    try:
        data, read = _records(task, recipe, screen)
    except UserError as error:
        if calibration.earlier is None:
            raise
        screen.say(f"note: {calibration.earlier} is used for the records of {run}: {error.first.message}")
        folder = {} if calibration.image_folder is None else {"image_folder": calibration.image_folder}
        task = {**task, "data": {**task["data"], "path": calibration.earlier, **folder}}
        data = _data_of(task, recipe)
        read = read_records(data)
        task = {**task, "fingerprint": read.fingerprint, "pictures": read.pictures}
    return task, data, read.train


def _records(task: Task, recipe: Recipe, screen: Screen) -> tuple[DataConfig, RunData]:
    """Find and read the records of a task: those with its fingerprint, in its text and in its pictures.

    A relative path begins in this folder or in one above a run: the training ran in one of them. Raises UserError with
    the places that were looked at.
    """
    run, stored = str(task["run"]), _data_of(task, recipe)
    if stored.path is None:
        raise _missing(run, "its folder names no records")
    reasons: dict[str, str] = {}
    for place in (Path(), *Path(run).resolve().parents, *Path(recipe.after or run).resolve().parents):
        data = _placed(stored, place)
        name = source_text(data)
        missing = [file for file in _files_of(data) if not (file.startswith("hub:") or Path(file).exists())]
        if name in reasons or len(missing) == len(_files_of(data)):
            continue
        if missing:
            reasons[name] = f"{missing[0]} is missing"
            continue
        try:
            with screen.step(f"reading the records of {run} in {name}"):
                read = read_records(data)
        except UserError as error:
            reasons[name] = str(error.first).splitlines()[0]
            continue
        if task["fingerprint"] not in ("", read.fingerprint):
            reasons[name] = f"{name} has other records"
        elif task.get("pictures", "") not in ("", read.pictures):
            reasons[name] = f"{name} fits, but the pictures in {data.image_folder} are others"
        else:
            return data, read
    if reasons:
        raise _missing(run, "none of the files found has them:\n" + "\n".join(reasons.values()))
    raise _missing(run, f"{source_text(stored)} is neither in {Path.cwd()} nor in a folder above {run}")


def _data_of(task: Task, recipe: Recipe) -> DataConfig:
    data = DataConfig.model_validate({**task["data"], "eval_path": None})
    return data if recipe.data.bad_images == "raise" else data.model_copy(update={"bad_images": recipe.data.bad_images})


def _placed(data: DataConfig, place: Path) -> DataConfig:

    def inside(name: str | None) -> Any:
        return name if name is None or name.startswith("hub:") else str(place / name)

    path: Any = data.path
    if isinstance(path, list):
        path = [s.model_copy(update={"path": inside(s.path), "image_folder": inside(s.image_folder)}) for s in path]
    else:
        path = inside(path)
    return data.model_copy(update={"path": path, "image_folder": inside(data.image_folder)})


def _files_of(data: DataConfig) -> list[str]:
    sources = data.path if isinstance(data.path, list) else [SourceConfig(path=str(data.path))]
    names = [data.image_folder, *(name for source in sources for name in (source.path, source.image_folder))]
    return [name for name in names if name is not None]


def entry(
    run: Path,
    recipe: Recipe,
    targets: Sequence[Target],
    protection: Mapping[str, Protection],
    records: RunData | Mapping[str, Any],
) -> Task:
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


def _tasks_of(folder: Path, template: str) -> list[Task]:
    """Return the entries of a finished run: those in its milora.json, or the one of a run that came after none.

    `template` is used for an adapter without a recipe.
    """
    saved = read_sidecar(folder)
    assert saved is not None
    if saved.tasks:
        return list(saved.tasks)
    environment = read_environment(folder) or read_environment(folder.parent)  # of the run of a checkpoint
    recipe = Recipe.parse({"template": template, **recipe_of_run(folder)})
    return [entry(folder, recipe, saved.targets, saved.protection, environment)]


def _require_rules(recipe: Recipe, after: Path, base: nn.Module, targets: Sequence[Target]) -> None:
    """Raise UserError for a base and targets whose update cannot be added to the update of the run in `after`."""
    saved = read_sidecar(after)
    assert saved is not None
    require_layers(base, saved)
    if found := [target.path for target in (*saved.targets, *targets) if target.method == "dora"]:
        message = f"DoRA scales the rows of a weight, so its update cannot be added to another one: {found[0]}"
        raise UserError(message, where=Key.of("after"), hint=f"use another method, or merge first:\n{to_merge(after)}")
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


def _missing(run: str, why: str) -> UserError:
    return UserError(
        f"the records of {run} are needed to protect what it has learned, and {why}", where=Key.of("after"), hint=HINT
    )


def has_other_records(adapter: Path, fingerprint: str) -> bool:
    before = (read_environment(adapter) or read_environment(adapter.parent)).get("records")
    return before is not None and before != fingerprint


def room_lines(targets: Sequence[Target], protection: Mapping[str, Protection], tasks: Sequence[Task]) -> list[str]:
    """Return a line per tower: the share of input directions that is free, and what was free in each earlier run."""
    lines = []
    for tower, now in protected_directions(targets, protection).items():
        before = [f"{1 - share:.1%} in {task['run']}" for task in tasks if (share := task["directions"].get(tower))]
        line = f"room  {tower}: {1 - now:.1%} of the input directions are free"
        lines.append(f"{line}; {', '.join(before)}" if before else line)
    return lines
