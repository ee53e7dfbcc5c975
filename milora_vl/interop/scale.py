"""The size of the update of an adapter folder (`export --scale`) and of a loaded model (`--scale` of chat and eval).

An update scales by its alpha. A module trained in full from W to W' becomes W + scale (W' - W).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from milora_vl.common.errors import UserError
from milora_vl.interop.lora_folder import PlainAdapter, more_than_factors, read_config


def require_scale(scale: object) -> None:
    if not isinstance(scale, Real) or isinstance(scale, bool) or not 0 <= float(scale) < math.inf:
        raise UserError(f"must be a number from 0, got {scale!r}", where="--scale")


def require_linear(folder: Path) -> None:
    """Raise UserError for an adapter whose update is not a product of two factors, so that it has no scale."""
    more = list(more_than_factors(folder).values())
    if read_config(folder, any_lora=True).bias != "none":
        more.append("trained biases")
    if more:
        message = f"the folder holds {more[0]}: its update is not a product of two factors, and cannot be scaled"
        hint = "remove --scale"
        raise UserError(message, where=str(folder), hint=hint)


def scaled(adapter: PlainAdapter, scale: float, base: nn.Module | None) -> PlainAdapter:
    """Return the adapter with its update times `scale`. `base` is the base model, needed for modules trained in full.

    The stored factors do not change; alpha does, in adapter_config.json and in milora.json.
    """
    factors = {path: replace(low, scaling=scale * low.scaling) for path, low in adapter.factors.items()}
    before = base.state_dict() if base is not None else {}
    whole = {}
    for name, trained in adapter.whole.items():
        if name not in before or before[name].shape != trained.shape:
            found = "no such weight" if name not in before else f"shape {tuple(before[name].shape)}"
            message = f"trained in full with shape {tuple(trained.shape)}, but the base model has {found}"
            hint = "name the base model of the adapter:  --base NAME-OR-FOLDER"
            raise UserError(message, code="adapter-wrong-base", where=name, hint=hint)
        whole[name] = _interpolated(before[name], trained, scale)
    sidecar = adapter.sidecar
    if sidecar is not None:
        targets = [t if t.alpha is None else replace(t, alpha=scale * t.alpha) for t in sidecar.targets]
        sidecar = replace(sidecar, targets=targets)
    return replace(adapter, factors=factors, whole=whole, sidecar=sidecar)


def _interpolated(W: Tensor, trained: Tensor, scale: float) -> Tensor:
    """Return W + scale (W' - W), in the dtype of W' = `trained`; counters keep its value."""
    if not trained.is_floating_point():
        return trained.clone()
    start = W.to(trained.device).double()
    return (start + scale * (trained.double() - start)).to(trained.dtype)


class Update:
    """The update of a trained model: its LoRA layers, and the weights trained in full with their values before.

    `before` gives these values by name for a model without an adapter (a whole model, or one with another projector);
    an adapter carries them itself, if `require_linear` accepts it. Raises UserError if they come from another kind of
    model.
    """

    def __init__(self, model: nn.Module, before: Mapping[str, Tensor] | None = None) -> None:
        self._layers: list[LoraLayer] = []
        self._whole: list[tuple[Tensor, Tensor, Tensor]] = []  # in the model, as trained, in the base
        if isinstance(model, PeftModel):
            self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
            self._whole = [(now, now.clone(), W) for now, W in _saved_modules(model)]
        elif before is not None:
            state = model.state_dict()
            _require_same_shapes(state, before)
            pairs = [(state[name], W) for name, W in before.items() if name in state]
            self._whole = [(now, now.clone(), W) for now, W in pairs if not torch.equal(now, W.to(now))]

    @torch.no_grad()
    def set(self, scale: float) -> None:
        """Make the update `scale` times what the training left: 1 is the trained model, 0 the base model."""
        for layer in self._layers:
            for name in layer.active_adapters:
                layer.set_scale(name, scale)
        for now, trained, W in self._whole:
            now.copy_(trained if scale == 1 else _interpolated(W, trained, scale))


def _require_same_shapes(state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    for name, W in before.items():
        found = tuple(state[name].shape) if name in state else "nothing"
        if found != tuple(W.shape):
            message = f"the base is another kind of model: its {name} is {tuple(W.shape)}, in the trained model {found}"
            hint = "name the model that the training started from"
            raise UserError(message, where="--base", hint=hint)


def _saved_modules(model: PeftModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of the modules trained in full, and its value in the base model."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            before = module.original_module.state_dict()
            for name in module.active_adapters:
                for key, tensor in module.modules_to_save[name].state_dict().items():
                    yield tensor, before[key]
