"""The size of a weight update of a small model, and its share in the first singular directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from milora_vl.core.adapter.lora import base_layer, lora_layer
from milora_vl.core.weights.matrices import as_matrix, is_adaptable
from milora_vl.core.weights.tensor_files import cached_factors


@dataclass(frozen=True, slots=True)
class Updates:
    """The weights before the training, by module path, as matrices (out, in); `top` is the number of first directions.

    The first directions are the same for all trainings; they are stored in the folder `cache` if it is set.
    """

    before: Mapping[str, Tensor]
    top: int | None
    cache: Path | None = None

    @classmethod
    def of(cls, base: nn.Module, top: int | None, cache: Path | None = None) -> Updates:
        """Copy the weights of a base model: a full training changes them."""
        matrices = {
            path: as_matrix(module, module.get_parameter("weight").detach()).clone()
            for path, module in base.named_modules()
            if is_adaptable(module)
        }
        return cls(matrices, top, cache)

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Return `update`, the norm of all changes divided by the norm of the changed weights, and `overlap`.

        For a model with an adapter only the adapted layers count, for a full training all layers. `overlap` is the
        share of the squared norm of the change that involves the first `top` singular directions of its weight, on
        either side: 1 - ||(I - U U') dW (I - V V')||^2 / ||dW||^2.
        """
        changed = weights = outside = 0.0
        for path, old, change in self._changes(model):
            changed += float(change.square().sum())
            weights += float(old.square().sum())
            if self.top is not None:
                outside += float(self._outside(path, old, change).square().sum())
        measures = {"update": math.sqrt(changed / weights) if weights else 0.0}
        if self.top is not None:
            measures["overlap"] = max(0.0, 1 - outside / changed) if changed else 0.0
        return measures

    def _changes(self, model: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        is_adapter = isinstance(model, PeftModel)
        for target in model.milora_targets:
            if target.path not in self.before or (is_adapter and target.rank is None):
                continue
            old = self.before[target.path].float()
            module = base_layer(model, target.path)
            if is_adapter:
                layer: Any = lora_layer(model, target.path)
                change = layer.get_delta_weight("default")
                yield target.path, old, as_matrix(module, change).float()
            else:
                yield target.path, old, as_matrix(module, module.get_parameter("weight")).float() - old

    def _outside(self, path: str, weight: Tensor, change: Tensor) -> Tensor:
        assert self.top is not None
        first = cached_factors(weight, min(self.top, *weight.shape), "principal", self.cache)
        left = change - first.U @ (first.U.T @ change)
        return left - (left @ first.Vh.T) @ first.Vh
