"""The base model of an export, loaded on first use; saves it in shards (names for vLLM), its processor.

An export gets the processor of the run folder (with the chat template of training), else of the base model.
"""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from milora_vl.common.atomic_write import atomic_file
from milora_vl.common.errors import UserError, at_flag
from milora_vl.models.base import config_of, load_processor, split_processor
from milora_vl.models.loading import load_weights
from milora_vl.models.timm_tower import TimmTowerConfig

PREFIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")


class ExportBase:
    """A base model by name, folder or hub id. Adapters record its `name`."""

    def __init__(self, source: str | Path | None, dtype: torch.dtype | None, *, is_rounded_later: bool = False) -> None:
        self.source = source
        self._dtype = dtype
        self._is_rounded_later = is_rounded_later

    @property
    def name(self) -> str:
        if not self.source:
            message, hint = "adapter_config.json does not name the base model", "add:  --base NAME-OR-FOLDER"
            raise UserError(message, where="--base", hint=hint)
        return str(self.source)

    @cached_property
    def config(self) -> Any:
        with at_flag("--base"):
            return config_of(self.name)

    @cached_property
    def model(self) -> nn.Module:
        dtype, saved = self._dtype, self.config.dtype
        if dtype is not None and self._is_rounded_later:  # a model that is built here names no dtype
            dtype = torch.promote_types(dtype, saved if isinstance(saved, torch.dtype) else torch.float32)
        with at_flag("--base"):
            return load_weights(self.name, dtype)


def has_timm_tower(config: Any) -> bool:
    """Return whether transformers needs this package to load a model with this HF config."""
    vision = config.to_dict().get("vision_config") or {}
    return bool(vision.get("model_type") == TimmTowerConfig.model_type)


def save_model(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a model; with `dtype`, also set the data type in the configs of its parts.

    Transformers 4 loads each part in the data type that its config names, and does not update the config.
    """
    for part in model.config.sub_configs if dtype is not None else ():
        getattr(model.config, part).dtype = dtype
    model.save_pretrained(folder, max_shard_size="5GB")
    _name_tower_as_published(model.config, folder)


PUBLISHED, CURRENT = "vision_tower.vision_model.", "vision_tower."


def _name_tower_as_published(config: Any, folder: Path) -> None:
    """Name the weights of a CLIP or SigLIP tower as published LLaVAs do; vLLM needs these names.

    Transformers 5 drops `vision_model.` from the names of a model that was not loaded with it. It reads both names.
    """
    vision = config.to_dict().get("vision_config") or {}
    if config.model_type not in ("llava", "llava_next") or vision.get("model_type") not in PREFIXED_TOWERS:
        return
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        renamed = {_published(name): tensor for name, tensor in tensors.items()}
        if renamed.keys() != tensors.keys():
            with atomic_file(shard) as part:  # the tensors are mapped from the shard
                save_file(renamed, part, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {_published(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _published(name: str) -> str:
    return name if name.startswith(PUBLISHED) or not name.startswith(CURRENT) else name.replace(CURRENT, PUBLISHED, 1)


# Files that tokenizers, image processors and processors of transformers write.
_FILES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt spiece.model chat_template.jinja chat_template.json preprocessor_config.json processor_config.json "
    "video_preprocessor_config.json image_processor.json"
).split()


def copy_processor(source: Path, target: Path, base: ExportBase) -> None:
    """Copy the processor of a run; files that it has not saved, such as the image processor, are the base's."""
    present = [name for name in _FILES if (source / name).is_file()]
    is_whole = "preprocessor_config.json" in present or "processor_config.json" in present
    processor = None if is_whole else load_processor(base.name)
    if processor is not None and (not present or split_processor(processor)[1] is not None):
        processor.save_pretrained(target)
    for name in present:
        shutil.copyfile(source / name, target / name)
