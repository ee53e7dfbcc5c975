"""The base model of a run: a model as it is, or one composed of the parts that the recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_data.errors import UserError
from milora_vl.models import loading
from milora_vl.models import parts as composing
from milora_vl.models.image_tokens import require_llava
from milora_vl.models.parts import Parts
from milora_vl.models.projector import projector_file
from milora_vl.recipe.schema import PartsConfig, Recipe

# LLaVA's word -> Hugging Face's.
FEATURES = {"patch": "default", "cls_patch": "full"}


def parts_of(recipe: Recipe) -> Parts | None:
    """The parts that the base is to be composed of; None where the model reads pictures already, or needs not to."""
    named = recipe.parts
    if named.vision_tower is None or _sees(recipe.model):
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
    """The config of the base, without its weights."""
    parts = parts_of(recipe)
    return loading.config_of(recipe.model) if parts is None else composing.planned_config(parts)


def check(recipe: Recipe) -> None:
    """Find out before anything loads whether all parts are there, and are a LLaVA's. UserError names what is not."""

    if recipe.factor_cache and Path(recipe.factor_cache).exists() and not Path(recipe.factor_cache).is_dir():
        raise UserError(f"--factor_cache {recipe.factor_cache}: expected a folder, this is a file")
    if _sees(recipe.model):
        require_llava(loading.config_of(recipe.model))
    parts = parts_of(recipe)
    if parts is not None:
        composing.require_parts(parts)
    elif recipe.projector_weights:
        projector_file(Path(recipe.projector_weights))


def settled(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with the composed base as its model, written where it is not there yet, and a line about it.

    A base that is made at first use is made here: of several processes one makes it, and the others find it.
    """
    parts = parts_of(recipe)
    if parts is None:
        loading.prepare(recipe.model)
        return recipe, ""
    folder, is_new = composing.base_folder(parts)
    done = "composed" if is_new else "composed before"
    line = f"base {folder}, {done} of {parts.describe()}; the adapter names it"
    return recipe.model_copy(update={"model": str(folder), "parts": PartsConfig(), "projector_weights": None}), line


def warnings(recipe: Recipe) -> list[str]:
    """What a named tower does not do: a model that reads pictures keeps its own."""
    named = recipe.parts
    if named == PartsConfig() or not recipe.model:
        return []
    if not _sees(recipe.model):
        return [] if named.vision_tower else ["without a --vision_tower, what is said of its layer has no effect"]
    config = loading.config_of(recipe.model)
    own = config.to_dict()
    differing = []
    if named.vision_tower and not _is_tower(config, named.vision_tower):
        differing.append(named.vision_tower)
    if own.get("vision_feature_layer", named.select_layer) != named.select_layer:
        differing.append(f"layer {named.select_layer}")
    if own.get("vision_feature_select_strategy", "default") != FEATURES[named.select_feature]:
        differing.append(f"feature {named.select_feature}")
    if not differing:
        return []
    return [f"{recipe.model} keeps the vision tower it was trained with; without effect: {', '.join(differing)}"]


def _is_tower(config: Any, name: str) -> bool:
    """Whether a named tower has the shape of the model's own (its weights are those of the model)."""
    try:
        other = loading.config_of(name)
    except UserError:
        return False
    sizes = ("model_type", "hidden_size", "image_size", "patch_size", "num_hidden_layers")
    own, named = config.vision_config.to_dict(), other.to_dict()
    return all(own.get(size) == named.get(size) for size in sizes)


def _sees(name: str) -> bool:
    try:
        return "vision_config" in loading.config_of(name).to_dict()
    except UserError:
        return False  # loading it says why
