"""Scale the update of a loaded model in place, again and again (`--scale` of chat and evaluation, `scales`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from milora_vl.common.errors import UserError
from milora_vl.interop.adapters.arithmetic import interpolated


class Update:
    """The update of a trained model: its LoRA layers, and the weights trained in full with their values before.

    `before` gives these values by name for a model without an adapter (a whole model, or one with another projector);
    an adapter carries them itself, if `require_scalable` accepts it. Raises UserError if they come from another kind of
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
            now.copy_(trained if scale == 1 else interpolated(W, [(trained, scale)]))


def _require_same_shapes(state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    for name, W in before.items():
        found = tuple(state[name].shape) if name in state else "nothing"
        if found != tuple(W.shape):
            raise UserError(
                f"the base is another kind of model: its {name} is {tuple(W.shape)}, in the trained model {found}",
                code="base-differs",
                where="--base",
                hint="name the model that the training started from",
            )


def _saved_modules(model: PeftModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of the modules trained in full, and its value in the base model."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            before = module.original_module.state_dict()
            for name in module.active_adapters:
                for key, tensor in module.modules_to_save[name].state_dict().items():
                    yield tensor, before[key]
