"""`--after FOLDER`: the tasks that a run comes after, and records of theirs for its calibration.

milora.json of the run lists all tasks in order, the run's own last. An entry holds what is needed to read its records:

    {"run": "runs/a", "template": "vicuna_v1", "records": 1200, "fingerprint": "4f0c...",
     "data": {"path": "a.json", "image_folder": "pictures", "eval_path": "held_out.json"},   # keys that are set
     "eval": {"suites": ["emoji"], "data": "questions"},                                     # the same
     "rules": [{"tower": "language", "method": "milora", "rank": 64, "protect": 0.95, "modules": 224}],
     "directions": {"language": 0.268}}   # share of the input directions that the run protected, mean over the layers
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milora_data.records.record import Record
from milora_vl.common.errors import Key, UserError, with_context
from milora_vl.core.adapter.checkpoints import read_environment
from milora_vl.core.adapter.fixed_a import Protection
from milora_vl.core.adapter.folders import module_path
from milora_vl.core.adapter.sidecar import read_sidecar
from milora_vl.core.calibration.texts import SEED
from milora_vl.core.policy import Target
from milora_vl.models.recipe_of_run import recipe_of_run
from milora_vl.train.plan import run_data
from milora_vl.train.plan.screen import Screen, protected_directions
from milora_vl.train.recipe.continued import to_merge
from milora_vl.train.recipe.schema import DataConfig, Recipe, SourceConfig

NUM_RECORDS = 128  # of each earlier task
HINT = "name similar records in the recipe:  calibration: {earlier: FILE, image_folder: FOLDER}"

Task = Mapping[str, Any]


def tasks_before(
    recipe: Recipe, targets: Sequence[Target], checkpoint: Path | None
) -> tuple[tuple[Task, ...], list[str]]:
    """Return the entries of the tasks that a run comes after, in order, and warnings.

    A resumed run has them in its checkpoint. Raises UserError for rules that cannot train after these tasks.
    """
    if recipe.after is None:
        return (), []
    if checkpoint is not None:
        saved = read_sidecar(checkpoint)
        return (() if saved is None else tuple(saved.tasks[:-1])), []
    _require_rules(recipe, Path(recipe.after), targets)
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

    Those of `calibration.earlier` stand in for records that are missing, unreadable or changed. Raises UserError where
    there are none.
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
    run, other = task["run"], recipe.calibration.earlier
    try:
        data, read = _records(task, recipe, screen)
        why = "have changed since" if task["fingerprint"] not in ("", read.fingerprint) else ""
    except UserError as error:
        if other is None:
            raise with_context(error, hint=HINT) from error
        why = "cannot be read"
    if why and other is not None:
        screen.say(f"note: {other} is used for the records of {run}, which {why}")
        folder = {} if recipe.calibration.image_folder is None else {"image_folder": recipe.calibration.image_folder}
        task = {**task, "data": {**task["data"], "path": other, **folder}}
        data, read = _records(task, recipe, screen)
        task = {**task, "fingerprint": read.fingerprint}
    elif why:
        screen.say(f"note: the records of {run} {why}; those that are there now are used")
    return task, data, read.train


def _records(task: Task, recipe: Recipe, screen: Screen) -> tuple[DataConfig, run_data.RunData]:
    data = _data_of(task)
    if recipe.data.bad_images != "raise":
        data = data.model_copy(update={"bad_images": recipe.data.bad_images})
    with screen.step(f"reading the records of {task['run']}"):
        return data, run_data.read_records(data)


def entry(
    run: Path,
    recipe: Recipe,
    targets: Sequence[Target],
    protection: Mapping[str, Protection],
    num_records: int | None,
    fingerprint: str,
) -> Task:
    """Return the entry of a task."""
    rules = Counter((target.tower, target.method, target.rank, target.protect) for target in targets)
    return {
        "run": str(run),
        "template": recipe.template,
        "records": num_records,
        "fingerprint": fingerprint,
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
    count, fingerprint = environment.get("data", {}).get("train"), environment.get("records", "")
    recipe = Recipe.parse({"template": template, **recipe_of_run(folder)})
    return [entry(folder, recipe, saved.targets, saved.protection, count, fingerprint)]


def _require_rules(recipe: Recipe, after: Path, targets: Sequence[Target]) -> None:
    """Raise UserError for targets whose update cannot be added to the update of the run in `after`."""
    saved = read_sidecar(after)
    assert saved is not None

    def rule_with(method: str) -> Key:
        numbers = [number for number, rule in enumerate(recipe.policy or ()) if rule.get("method") == method]
        return Key(("policy", numbers[0], "method")) if numbers else Key.of("policy")

    for places, where, hint in (
        (saved.targets, Key.of("after"), to_merge(after)),
        (targets, rule_with("dora"), "use another method"),
    ):
        found = [target.path for target in places if target.method == "dora"]
        if found:
            raise UserError(
                f"DoRA scales the rows of a weight, so its update cannot be added to another one: {found[0]}",
                code="after-method",
                where=where,
                hint=hint,
            )
    if all(target.rank is None for target in targets):
        raise UserError(
            "the rules train weights in full, which changes what the earlier runs have learned",
            code="after-full-module",
            where=rule_with("full"),
            hint="train adapters, for example  --method milora",
        )
    before = [target.path for target in saved.targets]
    for path in [target.path for target in targets if target.rank is None]:
        if module_path(path, before) or any(module_path(other, [path]) for other in before):
            raise UserError(
                f"{path} would train in full, but an earlier run has trained it: the new weight would replace that one",
                code="after-full-module",
                where=rule_with("full"),
                hint="give it an adapter, or leave its rule out; without a policy the run takes the earlier one's",
            )


def _data_of(task: Task) -> DataConfig:
    """Return where the records of a task are now. Raises UserError for a file that is not there any more.

    A relative path is looked up here, then in the folders above the run: the training ran in one of them.
    """
    data, run = DataConfig.model_validate({**task["data"], "eval_path": None}), str(task["run"])
    if data.path is None:
        raise _missing(run, "its folder names no records")

    def here(name: str | None) -> Any:
        if name is None or name.startswith("hub:") or Path(name).exists():
            return name
        found = next((place / name for place in Path(run).resolve().parents if (place / name).exists()), None)
        if found is None:
            raise _missing(run, f"{name} is not there any more")
        return str(found)

    folder = here(data.image_folder)
    if isinstance(data.path, str):
        return data.model_copy(update={"path": here(data.path), "image_folder": folder})
    sources = [SourceConfig(path=here(s.path), weight=s.weight, image_folder=here(s.image_folder)) for s in data.path]
    return data.model_copy(update={"path": sources, "image_folder": folder})


def _missing(run: str, why: str) -> UserError:
    return UserError(
        f"the records of {run} are needed to protect what it has learned, and {why}",
        code="after-no-records",
        where=Key.of("after"),
    )


def has_other_records(adapter: Path, fingerprint: str) -> bool:
    """Return whether the run of an adapter is known to have trained on other records."""
    before = (read_environment(adapter) or read_environment(adapter.parent)).get("records")
    return before is not None and before != fingerprint


def num_held(recipe: Recipe) -> int:
    """Return the numbers in the factors of the earlier runs, which the base of a run holds."""
    saved = None if recipe.after is None else read_sidecar(Path(recipe.after))
    return 0 if saved is None else sum((t.rank or 0) * (2 if t.has_anchor else 1) * sum(t.shape) for t in saved.targets)


def room_lines(targets: Sequence[Target], protection: Mapping[str, Protection], tasks: Sequence[Task]) -> list[str]:
    """Return a line per tower: the share of input directions that is free, and what was free in each earlier run."""
    lines = []
    for tower, now in protected_directions(targets, protection).items():
        before = [f"{1 - share:.1%} in {task['run']}" for task in tasks if (share := task["directions"].get(tower))]
        line = f"room  {tower}: {1 - now:.1%} of the input directions are free"
        lines.append(f"{line}; {', '.join(before)}" if before else line)
    return lines
