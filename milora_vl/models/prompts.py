"""Which template and picture settings a trained model gets in chat, evaluation and export: its run's."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_data.batches.processor_inputs import ProcessorSettings, configure_processor
from milora_data.encode.templates import OWN, TRAINED_WITH
from milora_vl.common.errors import UserError, at_flag
from milora_vl.core.adapter.folders import base_of, holds_adapter, recipe_of_run
from milora_vl.models.base import Base, find_base, split_processor

if TYPE_CHECKING:
    from milora_data.pictures.pixels import AspectRatio


@dataclass(frozen=True, slots=True)
class Prompts:
    """The template of a model, and how its pictures are prepared."""

    template: str
    image_aspect_ratio: AspectRatio
    settings: ProcessorSettings = field(default_factory=ProcessorSettings)

    def limit(self, processor: Any) -> None:
        """Set the limits of pixels of the training, and its choice of frames, in a processor."""
        configure_processor(processor, self.settings)


def prompts_of(model: str, adapter: Path | None, template: str | None = None) -> Prompts:
    """Return the prompts of a model with its adapter, as in its run, with `template` in place of the run's.

    `model` is a name or folder of a model, or an adapter folder. A folder without a recipe, such as a merged one, has
    its own chat template: a text model's or a training's, but not a published LLaVA's. A model whose
    processor prepares the pictures has its own chat template; raises UserError for another `template`, and for an
    unknown model.
    """
    folder = adapter or Path(model)
    name = base_of(folder) if adapter is None and holds_adapter(folder) else model
    data = recipe_of_run(folder).get("data") or {}
    with at_flag("--model"):
        base = find_base(name)
    if not base.own_pictures:
        return Prompts(template or _default_template(base, folder), data.get("image_aspect_ratio") or "pad")
    if template not in (None, OWN):
        message = f"{name} is asked with its own prompt format, not with {template}"
        hint = f"use --template {OWN}, or remove the flag"
        raise UserError(message, where="--template", hint=hint)
    named = {key.name: data[key.name] for key in fields(ProcessorSettings) if key.name in data}
    return Prompts(OWN, "pad", ProcessorSettings(**named))


def _default_template(base: Base, folder: Path) -> str:
    """Return the template of the run in `folder`, else of the model in it, else LLaVA-1.5's."""
    if template := recipe_of_run(folder).get("template"):
        return str(template)
    if holds_adapter(folder) or not (folder / "config.json").is_file():
        return trained_template(folder)
    own = split_processor(base.processor)[0].chat_template
    return OWN if own and (base.kind == "text" or str(own).startswith(TRAINED_WITH)) else trained_template(folder)


def trained_template(folder: Path) -> str:
    """Return the template of a run, by default LLaVA-1.5's. `folder` is as in `recipe_of_run`."""
    return recipe_of_run(folder).get("template") or "vicuna_v1"
