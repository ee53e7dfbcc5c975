"""The base model of an export: its config, its weights and its processor, each loaded only when it is asked for."""

from __future__ import annotations

import json
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_data.errors import UserError
from milora_vl import models
from milora_vl.timm_tower_config import TimmTowerConfig

# The code of a model with a timm tower, and the class that transformers finds in it with trust_remote_code=True.
CODE_FILES = ("timm_llava.py", "timm_tower.py", "timm_tower_config.py")
AUTO_MAP = {"AutoConfig": "timm_llava.TimmLlavaConfig"}


class Base:
    """A base model by name (or folder, or hub id), or one at hand. `name` is what adapters record."""

    def __init__(
        self, source: str | Path | nn.Module | None, dtype: torch.dtype | None, *, is_rounded_later: bool = False
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._is_rounded_later = is_rounded_later

    @property
    def name(self) -> str:
        """The name the base was given by; of a model at hand the one it knows itself."""
        if isinstance(self._source, nn.Module):
            return str(self.config.name_or_path)
        if not self._source:
            raise UserError("which base model? its adapter_config.json does not say\nsay:  --base NAME-OR-FOLDER")
        return str(self._source)

    @property
    def config(self) -> Any:
        """The HF config, without the weights."""
        return self._source.config if isinstance(self._source, nn.Module) else models.config_of(self.name)

    @cached_property
    def model(self) -> nn.Module:
        """The model with its weights, in the dtype they were saved in unless one was asked for."""
        if isinstance(self._source, nn.Module):
            return self._source
        dtype, saved = self._dtype, self.config.dtype
        if dtype is not None and self._is_rounded_later and isinstance(saved, torch.dtype):
            dtype = torch.promote_types(dtype, saved)
        return models.load_weights(self.name, dtype)

    def processor(self) -> Any:
        """Return the processor (of a text-only model the tokenizer); None for a model at hand. Needs no weights."""
        return None if isinstance(self._source, nn.Module) else models.load_processor(self.name)


def has_timm_tower(config: Any) -> bool:
    """Whether a model of this HF config needs this package (or its code beside it) to load in transformers."""
    vision = config.to_dict().get("vision_config") or {}
    return bool(vision.get("model_type") == TimmTowerConfig.model_type)


def write_code(folder: Path) -> None:
    """Put the code of a timm tower into the folder of a model, so that it loads without this package."""
    for name in CODE_FILES:
        (folder / name).write_text((files("milora_vl") / name).read_text(encoding="utf-8"), encoding="utf-8")
    config = folder / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) | {"auto_map": AUTO_MAP}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_model(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model to load again, all of it in `dtype` where one is given.

    Transformers 4 loads each part in the dtype that its own config says; nobody else updates that.
    """
    for part in model.config.sub_configs if dtype is not None else ():
        getattr(model.config, part).dtype = dtype
    model.save_pretrained(folder, max_shard_size="5GB")
