"""The base model of a run: composed of parts where the recipe names a vision tower, checked before weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_vl.common.cli.command_line import require_folder
from milora_vl.common.errors import Key, UserError
from milora_vl.models import loading
from milora_vl.models import parts as composing
from milora_vl.models.base import Base, find_base
from milora_vl.models.parts import Parts
from milora_vl.models.processors import configure_processor, usable_inputs
from milora_vl.models.projector import projector_file
from milora_vl.train.recipe.schema import PartsConfig, Recipe

# Name of the feature selection in LLaVA -> in Hugging Face.
FEATURES = {"patch": "default", "cls_patch": "full"}


def base_of_run(name: str, named: PartsConfig, projector: str | None) -> Base:
    """Return the base of a run: a model by its name, composed with the tower in `named` if it reads no images itself.

    Loads no weights. Raises UserError for an unknown name, or a config that is not available.
    """
    if named.vision_tower is None:
        return find_base(name)
    parts = Parts(name, named.vision_tower, projector, named.select_layer, named.select_feature, named.vision_weights)
    return find_base(name, parts)


def require_usable(recipe: Recipe, base: Base) -> None:
    """Raise UserError, before any weights load, if a part is missing or pictures cannot be prepared for the model."""
    if recipe.factor_cache:  # a complete cache may be on a disk that is read-only
        require_folder(Path(recipe.factor_cache), Key.of("factor_cache"), is_written=False)
    if base.own_pictures:
        configure_processor(base.processor, recipe.data.processor)
        usable_inputs(base.processor, base.name)
    if base.parts is not None:
        composing.require_parts(base.parts)
    elif recipe.projector_weights:
        projector_file(Path(recipe.projector_weights))


def compose(recipe: Recipe, base: Base) -> tuple[Recipe, Base, str]:
    """Return the recipe with the composed base as its model, this base, and a log line; composes it at first use.

    If several processes call this, one of them composes the base.
    """
    if base.parts is None:
        loading.prepare(recipe.model)
        return recipe, base, ""
    folder, is_new = composing.base_folder(base.parts)
    done = "composed" if is_new else "composed before"
    line = f"base {folder}, {done} from {base.parts.describe()}; the adapter refers to it"
    return _with_model(recipe, folder), find_base(str(folder)), line


def named_as_composed(recipe: Recipe, base: Base, model: str) -> Recipe:
    """Return the recipe that `compose` returns if `model`, the composed base of an earlier run, has the same parts."""
    if base.parts is None or composing.planned_folder(base.parts).name != Path(model).name:
        return recipe
    return _with_model(recipe, Path(model))


def _with_model(recipe: Recipe, folder: Path) -> Recipe:
    return recipe.model_copy(update={"model": str(folder), "parts": PartsConfig(), "projector_weights": None})


def warnings(named: PartsConfig, base: Base) -> list[str]:
    """Return warnings about settings without effect: a model that reads images keeps its own vision tower."""
    if named == PartsConfig() or base.parts is not None:
        return []
    if not base.reads_pictures:
        return ["the flags about the vision layer have no effect without --vision_tower"]
    values = base.config.to_dict()
    differing = []
    if named.vision_tower and not _is_tower(base.config, named.vision_tower):
        differing.append(named.vision_tower)
    if values.get("vision_feature_layer", named.select_layer) != named.select_layer:
        differing.append(f"layer {named.select_layer}")
    if values.get("vision_feature_select_strategy", "default") != FEATURES[named.select_feature]:
        differing.append(f"feature {named.select_feature}")
    if not differing:
        return []
    return [f"{base.name} keeps the vision tower that it was trained with; no effect: {', '.join(differing)}"]


def _is_tower(config: Any, name: str) -> bool:
    """Return whether a named tower has the shape of the model's tower. The weights always come from the model."""
    try:
        other = loading.config_of(name)
    except UserError:  # the run does not need this tower
        return False
    sizes = ("model_type", "hidden_size", "image_size", "patch_size", "num_hidden_layers")
    tower, named = config.vision_config.to_dict(), other.to_dict()
    return all(tower.get(size) == named.get(size) for size in sizes)
