"""The base model of a run: its config, or the parts it is composed of; does its own processor prepare the pictures?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_data.encode.templates import OWN
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import require_folder
from milora_vl.models import loading
from milora_vl.models import parts as composing
from milora_vl.models.image_tokens import uses_processor
from milora_vl.models.parts import Parts
from milora_vl.models.processors import limit_pixels, usable_inputs
from milora_vl.models.projector import projector_file
from milora_vl.recipe.schema import PartsConfig, Recipe

# Name of the feature selection in LLaVA -> in Hugging Face.
FEATURES = {"patch": "default", "cls_patch": "full"}


def parts_of(recipe: Recipe) -> Parts | None:
    """Return the parts of a composed base; None if the recipe names no tower or the model already reads images."""
    named = recipe.parts
    if named.vision_tower is None or _reads_images(recipe.model):
        return None
    return Parts(
        recipe.model,
        named.vision_tower,
        recipe.projector_weights,
        named.select_layer,
        named.select_feature,
        named.vision_weights,
    )


def config_for(recipe: Recipe) -> Any:
    """Return the config of the base; loads no weights."""
    parts = parts_of(recipe)
    return loading.config_of(recipe.model) if parts is None else composing.planned_config(parts)


def require_usable(recipe: Recipe) -> None:
    """Raise UserError, before any weights load, if a part is missing or pictures cannot be prepared for the model."""

    for key, cache in (("factor_cache", recipe.factor_cache), ("data.feature_cache", recipe.data.feature_cache)):
        if cache:  # a complete cache may be on a disk that is read-only
            require_folder(Path(cache), key, is_written=False)
    if prepares_with_processor(recipe.model):
        processor = loading.load_processor(recipe.model)
        limit_pixels(processor, recipe.data.min_pixels, recipe.data.max_pixels)
        usable_inputs(processor, recipe.model)
    parts = parts_of(recipe)
    if parts is not None:
        composing.require_parts(parts)
    elif recipe.projector_weights:
        projector_file(Path(recipe.projector_weights))


def resolved(recipe: Recipe) -> tuple[Recipe, str]:
    """Return the recipe with the composed base as its model, and a log line; composes the base at first use.

    If several processes call this, one of them composes the base.
    """
    parts = parts_of(recipe)
    if parts is None:
        loading.prepare(recipe.model)
        return recipe, ""
    folder, is_new = composing.base_folder(parts)
    done = "composed" if is_new else "composed before"
    line = f"base {folder}, {done} from {parts.describe()}; the adapter refers to it"
    return _composed(recipe, folder), line


def named_as_composed(recipe: Recipe, model: str) -> Recipe:
    """Return what `resolved` returns if `model`, the composed base of an earlier run, has the same parts."""
    parts = parts_of(recipe)
    if parts is None or composing.planned_folder(parts).name != Path(model).name:
        return recipe
    return _composed(recipe, Path(model))


def _composed(recipe: Recipe, folder: Path) -> Recipe:
    return recipe.model_copy(update={"model": str(folder), "parts": PartsConfig(), "projector_weights": None})


def warnings(recipe: Recipe) -> list[str]:
    """Return warnings about settings without effect: a model that reads images keeps its own vision tower."""
    named = recipe.parts
    if named == PartsConfig() or not recipe.model:
        return []
    if recipe.template == OWN and parts_of(recipe):
        return [f"--template {OWN}: a composed base uses vicuna_v1, not the template of {recipe.model}"]
    if not _reads_images(recipe.model):
        return [] if named.vision_tower else ["the flags about the vision layer have no effect without --vision_tower"]
    config = loading.config_of(recipe.model)
    values = config.to_dict()
    differing = []
    if named.vision_tower and not _is_tower(config, named.vision_tower):
        differing.append(named.vision_tower)
    if values.get("vision_feature_layer", named.select_layer) != named.select_layer:
        differing.append(f"layer {named.select_layer}")
    if values.get("vision_feature_select_strategy", "default") != FEATURES[named.select_feature]:
        differing.append(f"feature {named.select_feature}")
    if not differing:
        return []
    return [f"{recipe.model} keeps the vision tower that it was trained with; no effect: {', '.join(differing)}"]


def _is_tower(config: Any, name: str) -> bool:
    """Return whether a named tower has the shape of the model's tower. The weights always come from the model."""
    try:
        other = loading.config_of(name)
    except UserError:
        return False
    sizes = ("model_type", "hidden_size", "image_size", "patch_size", "num_hidden_layers")
    tower, named = config.vision_config.to_dict(), other.to_dict()
    return all(tower.get(size) == named.get(size) for size in sizes)


def prepares_with_processor(name: str) -> bool:
    """Return whether the pictures of a named model are prepared by its own processor; False for an unknown model."""
    try:
        return uses_processor(loading.config_of(name))
    except UserError:
        return False  # loading the model reports the error


def _reads_images(name: str) -> bool:
    try:
        return "vision_config" in loading.config_of(name).to_dict()
    except UserError:
        return False  # loading the model reports the error
