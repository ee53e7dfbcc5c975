"""A model with its processor and, where one is named, an adapter of any origin: one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milora_vl.adapters.folders import base_of, holds_adapter, holds_projector_alone
from milora_vl.adapters.load_any import load_any
from milora_vl.models.loading import load_processor, load_weights
from milora_vl.models.projector import load_projector
from milora_vl.models.quantized import Quantization

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def load_model(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantization: Quantization | BitsAndBytesConfig | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model and its processor (of a text-only model: its tokenizer), in eval mode.

    name_or_path: a name of NAMED_MODELS, a hub id, or a folder; a folder with an adapter brings its base along.
    adapter: a folder with an adapter of ours, PEFT's, LLaVA's own code, or one trained on a residual base that it
    brings along, told by its files; or with a projector alone (`mm_projector.safetensors`).
    dtype: default float32 on a CPU, as saved elsewhere. device: default the CPU.
    quantization: 4bit, 8bit, or settings of bitsandbytes.

    Raises UserError for an unknown name, a model that cannot be had, and a folder that holds none.

    >>> model, processor = load_model("tiny")
    >>> type(model).__name__
    'LlavaForConditionalGeneration'
    """
    name = str(name_or_path)
    if adapter is None and holds_adapter(Path(name)):
        name, adapter = base_of(Path(name)), name
    device = torch.device(device or "cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else None)
    model, processor = load_weights(name, dtype, quantization=quantization, device=device), load_processor(name)
    if adapter is not None:
        model = _with_adapter(model, Path(adapter))
    if quantization is None:
        model = model.to(device)
    return model.eval(), processor


def _with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    if holds_projector_alone(folder):
        load_projector(model, folder)
        return model
    return load_any(model, folder)
