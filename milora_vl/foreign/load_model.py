"""`load_model`: a model, its processor and optionally an adapter of any origin; the same by the flags of a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milora_vl.adapter.folders import base_of, holds_adapter, holds_projector_alone, require_no_base
from milora_vl.base.errors import UserError
from milora_vl.foreign.arithmetic import require_scale
from milora_vl.foreign.load_any import load_any, require_scalable
from milora_vl.foreign.scale import Update
from milora_vl.models.devices import device_named, dtype_named
from milora_vl.models.loading import load_processor, load_weights
from milora_vl.models.projector import load_projector
from milora_vl.models.quantized import Quantization

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def load_model(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    scale: float = 1.0,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantization: Quantization | BitsAndBytesConfig | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model and its processor (for a text-only model: its tokenizer), in eval mode.

    name_or_path: a name of NAMED_MODELS, a hub id, or a folder; for an adapter folder its base is loaded too.
    adapter: a folder with an adapter from this package, PEFT or LLaVA's code, an adapter with its residual base, or
    only a projector (`mm_projector.safetensors`).
    scale: size of the finished update, a number from 0; 0.5 is half of it, 0 the base model. Modules trained in full
    become W + scale (W' - W).
    base: name, hub id or folder of the base of a model that trained in full, which `scale` needs.
    dtype: default float32 on a CPU, else as saved. device: default the CPU.
    quantization: 4bit, 8bit, or settings of bitsandbytes.

    Raises UserError for an unknown name, a model that is not available, a folder without a model, a scale that is not
    a number from 0, and an update that has no scale.

    >>> model, processor = load_model("tiny")
    >>> type(model).__name__
    'LlavaForConditionalGeneration'
    """
    require_scale(scale)
    name = str(name_or_path)
    require_no_base(name, adapter, base)
    if adapter is None and holds_adapter(Path(name)):
        name, adapter = base_of(Path(name)), name
    if adapter is None and base is None and scale != 1:
        raise UserError(
            "needs an update to scale: an adapter, or a fully trained model and its base",
            code="flag-needs-another",
            where="--scale",
            hint="add:  --adapter FOLDER   or   --base MODEL",
        )
    device = torch.device(device or "cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else None)
    model, processor = load_weights(name, dtype, quantization=quantization, device=device), load_processor(name)
    if adapter is not None:
        model = _with_adapter(model, Path(adapter), scale)
    elif base is not None and scale != 1:
        update_since(base, model).set(scale)
    if quantization is None:
        model = model.to(device)
    return model.eval(), processor


def load_by_flags(
    name: str, adapter: Path | None, dtype: str | None, device: str | None, scale: float = 1.0
) -> tuple[nn.Module, Any]:
    """Load a model as `load_model` does, by the values of --model, --adapter, --dtype, --device and --scale.

    Without a device, the model goes to the first GPU, or to the CPU without one.
    """
    place = device_named(device)
    return load_model(name, adapter=adapter, scale=scale, dtype=dtype_named(dtype, place), device=place)


def update_since(base: str, model: nn.Module) -> Update:
    """Return the update of a model that trained in full, whose size can be set. Raises UserError for another base."""
    weight = next(model.parameters())
    return Update(model, load_weights(base, weight.dtype, device=weight.device).state_dict())


def _with_adapter(model: nn.Module, folder: Path, scale: float) -> nn.Module:
    if holds_projector_alone(folder):
        before = {} if scale == 1 else {name: tensor.clone() for name, tensor in model.state_dict().items()}
        load_projector(model, folder)
        Update(model, before).set(scale)
        return model
    if scale == 1:
        return load_any(model, folder)
    require_scalable(model, folder)
    tuned: nn.Module = load_any(model, folder)
    Update(tuned).set(scale)
    return tuned
