"""`make_plan`: check a request and choose the run folder, without data and weights; for `train` and `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from milora_vl.plan import requirements, run_folder, training_args
from milora_vl.plan.resuming import Resumed
from milora_vl.plan.run_folder import RunFolder
from milora_vl.recipe import settings
from milora_vl.recipe.arguments import Request
from milora_vl.recipe.schema import Recipe
from milora_vl.recipe.settings import Settings


@dataclass(frozen=True, slots=True)
class Plan:
    """The recipe with every flag applied, the folder of the run, and the run that it continues, if any."""

    request: Request
    settings: Settings
    recipe: Recipe  # the recipe of the settings, without the hub's token
    hub_token: str | None
    folder: RunFolder
    resumed: Resumed
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def make_plan(request: Request, *, processes: int) -> Plan:
    """Resolve the request and check everything that can be checked without data and weights.

    `processes` is the number of devices that train.
    Raises RecipeError where the rules do not fit the model, UserError for other mistakes.
    """
    chosen = settings.resolve(request)
    recipe, token = run_folder.without_token(chosen.recipe)
    path = Path(request.output_dir) if request.output_dir else run_folder.default_path(recipe, datetime.now())
    folder = run_folder.choose(path, request.resume)
    if isinstance(config := recipe.train.get("deepspeed"), str) and config:  # --deepspeed= switches it off
        training_args.deepspeed_config(config)
    requirements.check(recipe.train, recipe.quantization, recipe.attn_implementation)
    training_args.require_valid(recipe)
    resumed = Resumed(folder, request.resume)
    resumed.compare(recipe, implicit_policy=chosen.implicit_policy, processes=processes)
    settings.require_fit(request, recipe)
    return Plan(request, chosen, recipe, token, folder, resumed, tuple(chosen.notes), tuple(chosen.warnings))
