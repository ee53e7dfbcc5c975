"""`make_plan`: all that can be known of a run before data and weights load, for `train` and `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from milora_vl.common.errors import UserError
from milora_vl.common.yaml_text import read_file
from milora_vl.core.adapter import checkpoints
from milora_vl.core.policy import Target
from milora_vl.models.base import Base
from milora_vl.models.devices import fastest_dtype, train_device
from milora_vl.train.plan import earlier_tasks, rates, requirements, resuming, run_folder, train_section
from milora_vl.train.plan.base import compose
from milora_vl.train.plan.fit import base_kl_of, fit
from milora_vl.train.plan.launch import read_launch
from milora_vl.train.plan.resuming import Resumed
from milora_vl.train.plan.run_folder import RunFolder
from milora_vl.train.plan.train_section import TrainSection
from milora_vl.train.recipe.flags import Request
from milora_vl.train.recipe.merge import Settings
from milora_vl.train.recipe.schema import BaseKLConfig, Recipe


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that nothing is known to stop: what trains on which base, in which folder, and what it continues."""

    settings: Settings  # what the user has set, and where
    recipe: Recipe  # as it fits the base, without the hub's token
    base: Base
    targets: tuple[Target, ...]  # with the learning rates of the run
    section: TrainSection
    hub_token: str | None
    folder: RunFolder
    resumed: Resumed | None
    started: datetime
    warnings: tuple[str, ...]
    tasks: tuple[earlier_tasks.Task, ...] = ()  # that the run comes after

    @property
    def base_kl(self) -> BaseKLConfig:
        """Return the term with its weight. `recipe` keeps an open weight open: another method has its own."""
        return base_kl_of(self.recipe, self.base, self.targets)

    @property
    def reads_calibration(self) -> bool:
        """Return whether the run reads the calibration; a resumed run has its protected inputs already."""
        protects = self.folder.checkpoint is None and any(target.protect for target in self.targets)
        return protects or bool(self.base_kl.weight)

    def composed(self) -> tuple[Plan, str]:
        """Return the plan on a base that exists, composed of its parts at first use, and a log line."""
        recipe, base, line = compose(self.recipe, self.base)
        return replace(self, recipe=recipe, base=base), line


def make_plan(settings: Settings, *, processes: int) -> Plan:
    """Check everything that can be checked without data and weights. `processes` is the number of devices that train.

    Raises RecipeError with all problems of the recipe and its model, UserError for other mistakes.
    """
    request, started = settings.request, datetime.now().astimezone()
    fitting, base, targets, warnings = fit(settings)
    recipe, token = run_folder.without_token(with_dtype(fitting, request))
    path = Path(request.output_dir) if request.output_dir else run_folder.default_path(recipe, started)
    folder = run_folder.choose(path, request.resume)
    tasks, notes = earlier_tasks.tasks_before(recipe, targets, folder.checkpoint)
    launch = read_launch(recipe.train)
    requirements.require_installed(recipe)
    section = train_section.derive(recipe, base, targets, launch)
    if problems := train_section.conflicts(recipe, targets, section):
        raise UserError(problems=problems)
    train_section.require_accepted(recipe, section)
    earlier = resuming.read_earlier(folder, request.resume)
    warnings += notes + rates.warnings(targets, section.arguments, method=request.edits.method)
    return Plan(
        settings=settings,
        recipe=recipe,
        base=base,
        targets=tuple(rates.in_force(targets, section.arguments)),
        section=section,
        hub_token=token,
        folder=folder,
        resumed=None if earlier is None else resuming.resumed(earlier, recipe, base, processes),
        started=started,
        warnings=tuple(warnings),
        tasks=tasks,
    )


def with_dtype(recipe: Recipe, request: Request) -> Recipe:
    """Return the recipe with the dtype that `fastest` means on this machine, or meant in the run that it resumes."""
    if recipe.dtype != "fastest":
        return recipe
    run = checkpoints.resumed_run(request.output_dir, request.resume)
    before = None
    if run is not None and (run / "recipe.yaml").is_file():  # else nothing was saved: the run starts again
        before = read_file(run / "recipe.yaml")[0].get("dtype")
    fastest = str(fastest_dtype(train_device(recipe.train))).removeprefix("torch.")
    return recipe.model_copy(update={"dtype": before or fastest})
