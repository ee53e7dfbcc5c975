"""`load_model`: a model, its processor and optionally an adapter of any origin; the same by the flags of a command.

The files of a folder, not its name, decide what it is: an adapter of ours or of PEFT, a LoRA folder of LLaVA, or an
adapter trained on a residual base. The latter two are converted in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milora_vl.common.errors import UserError, expected_format
from milora_vl.core.adapter.folders import (
    base_of,
    has_config,
    holds_adapter,
    holds_projector_alone,
    holds_residual,
    require_no_base,
)
from milora_vl.core.adapter.save_load import load_adapter
from milora_vl.interop.adapters.arithmetic import require_linear, require_scale
from milora_vl.interop.adapters.imported import import_adapter
from milora_vl.interop.adapters.plain import write_plain
from milora_vl.interop.adapters.residual import refuse_mutating
from milora_vl.interop.adapters.scale import Update
from milora_vl.interop.adapters.source import Source, find_source
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
    if scale != 1:
        require_scalable(model, folder)
    tuned: nn.Module = _load_any(model, folder)
    if scale != 1:
        Update(tuned).set(scale)
    return tuned


def _load_any(model: nn.Module, folder: Path) -> Any:
    """Return `model` with the adapter in `folder`, which may be of any kind.

    Raises AdapterError and UserError for an adapter that does not fit, and UserError for an adapter that was
    trained on a residual base and lacks its initial factors: it would load on the unchanged base and be wrong.
    """
    if not (has_config(folder) or holds_residual(folder)):
        return load_adapter(model, folder)  # reports what is missing
    message, hint = "the files of this adapter do not belong together", "restore the files of one save"
    with expected_format(message, code="adapter-damaged-file", where=str(folder), hint=hint):
        source = find_source(folder)
        if source.kind == "plain":
            refuse_mutating(source.folder)
        if source.kind in ("ours", "plain") or _is_residual_of(model, source):
            return load_adapter(model, source.folder)
        adapter, _ = import_adapter(source, model, str(model.name_or_path))
        with tempfile.TemporaryDirectory() as scratch:
            write_plain(adapter, Path(scratch))
            if adapter.sidecar is not None:
                adapter.sidecar.write(Path(scratch), adapter.anchors)
            return load_adapter(model, scratch)


def require_scalable(model: nn.Module, folder: Path) -> None:
    """Raise UserError for an adapter whose update has no scale on this model.

    On a residual base, the factors hold the start too: their scale is not the scale of the update.
    """
    source = find_source(folder)
    if _is_residual_of(model, source):
        raise UserError(
            "the model is the residual base, so a scale would also change the components that it lacks",
            code="adapter-not-scalable",
            where="--scale",
            hint="use the unchanged base model:  --model BASE",
        )
    require_linear(source.folder, "--scale")


def _is_residual_of(model: nn.Module, source: Source) -> bool:
    """Return whether the model is the residual base, which the trained factors fit without conversion."""
    return source.residual is not None and Path(str(model.name_or_path)).resolve() == source.residual.resolve()
