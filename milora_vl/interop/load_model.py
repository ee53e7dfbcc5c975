"""`load_model`: a model, its processor and optionally an adapter of any origin; the same by the flags of a command.

The files of a folder, not its name, decide what it is: an adapter of ours or of PEFT, or a LoRA folder of LLaVA, which
is converted in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milora_vl.common.errors import UserError, expected_format
from milora_vl.core.adapter.folders import base_of, has_config, holds_adapter, holds_projector_alone, require_no_base
from milora_vl.core.adapter.load import load_adapter
from milora_vl.interop.imported import import_adapter, kind_of, names_residual_base, require_unchanged_base
from milora_vl.interop.lora_folder import write_ours
from milora_vl.interop.scale import Update, require_linear, require_scale
from milora_vl.models.base import load_processor
from milora_vl.models.devices import Quantization, device_named, fastest_dtype
from milora_vl.models.loading import load_weights
from milora_vl.models.projector import load_projector, projector_of

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
    adapter: a folder with an adapter from this package, PEFT or LLaVA's code, or only a projector
    (`mm_projector.safetensors`).
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
        message = "needs an update to scale: an adapter, or a fully trained model and its base"
        hint = "add:  --adapter FOLDER   or   --base MODEL"
        raise UserError(message, code="flag-needs-another", where="--scale", hint=hint)
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
    chosen = device_named(device)
    named = fastest_dtype(chosen) if dtype == "fastest" else getattr(torch, dtype) if dtype else None
    return load_model(name, adapter=adapter, scale=scale, dtype=named, device=chosen)


def update_since(base: str, model: nn.Module) -> Update:
    """Return the update of a model that trained in full, whose size can be set. Raises UserError for another base."""
    weight = next(model.parameters())
    return Update(model, load_weights(base, weight.dtype, device=weight.device).state_dict())


def _with_adapter(model: nn.Module, folder: Path, scale: float) -> nn.Module:
    if holds_projector_alone(folder):
        projector = projector_of(model)
        before = {} if scale == 1 else {name: tensor.clone() for name, tensor in projector.state_dict().items()}
        load_projector(model, folder)
        Update(projector, before).set(scale)
        return model
    if scale != 1:
        require_scalable(model, folder)
    tuned: nn.Module = load_any(model, folder)
    if scale != 1:
        Update(tuned).set(scale)
    return tuned


def load_any(model: nn.Module, folder: Path, *, allow_base_mismatch: bool = False) -> Any:
    if not has_config(folder):
        return load_adapter(model, folder)  # reports what is missing
    message, hint = "the files of this adapter do not belong together", "restore the files of one save"
    with expected_format(message, code="adapter-damaged-file", where=str(folder), hint=hint):
        kind, name = kind_of(folder), str(model.name_or_path)
        if kind != "llava":
            if kind == "plain":
                require_unchanged_base(folder, name)
            return load_adapter(model, folder, allow_base_mismatch=allow_base_mismatch)
        with tempfile.TemporaryDirectory() as scratch:
            write_ours(import_adapter(folder, model, name), Path(scratch))
            return load_adapter(model, scratch)


def require_scalable(model: nn.Module, folder: Path) -> None:
    """Raise UserError for an adapter whose update has no scale on this model.

    On a residual base, the factors hold the start too: their scale is not the scale of the update.
    """
    if names_residual_base(folder):
        message = f"{model.name_or_path} is a residual base, so a scale would also change the components that it lacks"
        hint = "convert it there: PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        raise UserError(message, where="--scale", hint=hint)
    require_linear(folder)
