"""A base model without its weights, looked up once by its name: config, kind, parts, meta model, processor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from milora_data.pictures.pixels import Tiling
from milora_vl.models import loading
from milora_vl.models.image_tokens import image_tokens, tiling_of, uses_processor
from milora_vl.models.parts import Parts, planned_config

# text: no pictures. llava: our collator prepares the pictures. processor: the model's own processor prepares them.
BaseKind = Literal["text", "llava", "processor"]


@dataclass(frozen=True)
class Base:
    """A base model without its weights. Its meta model and its processor are made when they are first needed."""

    name: str
    config: Any
    kind: BaseKind
    tiling: Tiling | None = None  # LLaVA-1.6 only
    parts: Parts | None = None  # what it is composed of before it loads; None for a model that exists

    @classmethod
    def of(cls, name: str, config: Any, parts: Parts | None = None) -> Base:
        kind: BaseKind = "text"
        if "vision_config" in config.to_dict():
            kind = "processor" if uses_processor(config) else "llava"
        return cls(name, config, kind, tiling_of(config), parts)

    @cached_property
    def meta(self) -> nn.Module:
        """The model on the meta device, which allocates no memory."""
        return loading.meta_model(self.config)

    @cached_property
    def processor(self) -> Any:
        return loading.load_processor(self.name)

    @property
    def reads_pictures(self) -> bool:
        return self.kind != "text"

    @property
    def own_pictures(self) -> bool:
        """Return whether the model's own processor prepares its pictures, by its own prompt format."""
        return self.kind == "processor"

    @property
    def tokens_of_a_picture(self) -> int:
        return image_tokens(self.config) if self.kind == "llava" else 0


def find_base(name: str, parts: Parts | None = None) -> Base:
    """Return the base of a run: a model by its name, composed of `parts` if it reads no images itself.

    Loads no weights. Raises UserError for an unknown name, or a config that is not available.
    """
    config = loading.config_of(name)
    if parts is None or "vision_config" in config.to_dict():
        return Base.of(name, config)
    return Base.of(name, planned_config(parts), parts)
