"""The base model of an export: its config, its weights and its processor, each had only when it is asked for.

The processor beside an export: the run folder's own, whose chat template is that of training, else the base's.
"""

from __future__ import annotations

import shutil
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_data.errors import UserError
from milora_vl.models import loading


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
        return self._source.config if isinstance(self._source, nn.Module) else loading.config_of(self.name)

    @cached_property
    def model(self) -> nn.Module:
        """The model with its weights, in the dtype they were saved in unless one was asked for."""
        if isinstance(self._source, nn.Module):
            return self._source
        dtype, saved = self._dtype, self.config.dtype
        if dtype is not None and self._is_rounded_later and isinstance(saved, torch.dtype):
            dtype = torch.promote_types(dtype, saved)
        return loading.load_weights(self.name, dtype)

    def processor(self) -> Any:
        """Return the processor (of a text-only model the tokenizer); None for a model at hand. Needs no weights."""
        return None if isinstance(self._source, nn.Module) else loading.load_processor(self.name)


def save_model(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model to load again, all of it in `dtype` where one is given.

    Transformers 4 loads each part in the dtype that its own config says; nobody else updates that.
    """
    for part in model.config.sub_configs if dtype is not None else ():
        getattr(model.config, part).dtype = dtype
    model.save_pretrained(folder, max_shard_size="5GB")


# What tokenizers, image processors and processors of transformers write.
_FILES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt spiece.model chat_template.jinja chat_template.json preprocessor_config.json processor_config.json "
    "video_preprocessor_config.json image_processor.json"
).split()


def copy_processor(source: Path, target: Path, base: Base) -> None:
    """Copy the processor's files of `source`; where it has none, write the base's, or say why not."""
    found = [name for name in _FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    if found:
        return
    try:
        processor = base.processor()
    except UserError as error:
        sys.stderr.write(f"no processor written: {str(error).splitlines()[0]}\n")
        return
    if processor is not None:
        processor.save_pretrained(target)
