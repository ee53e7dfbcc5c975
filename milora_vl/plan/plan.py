"""`make_plan`: check a request and choose the run folder, without data and weights; for `train` and `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from milora_vl.plan import requirements, run_folder, train_section
from milora_vl.plan.resuming import Resumed
from milora_vl.plan.run_folder import RunFolder
from milora_vl.recipe.command_line import Request
from milora_vl.recipe.merge import merge_recipe, require_fit
from milora_vl.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Plan:
    """The recipe with every flag applied, the folder of the run, and the run that it continues, if any."""

    request: Request
    recipe: Recipe  # without the hub's token
    recipe_source: str  # name or file of the recipe, or "" without one
    recipe_batch: tuple[int, int] | None  # what the recipe itself says: per device, accumulation
    implicit_policy: bool  # default rules: a model without projector gets no projector rule
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
    merged = merge_recipe(request)
    recipe, token = run_folder.without_token(merged.recipe)
    path = Path(request.output_dir) if request.output_dir else run_folder.default_path(recipe, datetime.now())
    folder = run_folder.choose(path, request.resume)
    if isinstance(config := recipe.train.get("deepspeed"), str) and config:  # --deepspeed= switches it off
        train_section.deepspeed_config(config)
    requirements.require_installed(recipe.train, recipe.quantization, recipe.attn_implementation)
    train_section.require_valid(recipe)
    resumed = Resumed(folder, request.resume)
    resumed.compare(recipe, implicit_policy=merged.implicit_policy, processes=processes)
    require_fit(request, recipe)
    return Plan(
        request=request,
        recipe=recipe,
        recipe_source=merged.source,
        recipe_batch=merged.batch_in_recipe,
        implicit_policy=merged.implicit_policy,
        hub_token=token,
        folder=folder,
        resumed=resumed,
        notes=tuple(merged.notes),
        warnings=tuple(merged.warnings),
    )
