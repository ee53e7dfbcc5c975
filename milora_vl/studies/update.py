"""How far a training moved the weights of a small model, and how much of that lies in their first directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from milora_vl.initialize import cached_factors
from milora_vl.lora.install import base_layer, lora_layer
from milora_vl.weights.matrices import as_matrix, is_adaptable


@dataclass(frozen=True, slots=True)
class Updates:
    """The weights before the training, by module path, as matrices (out, in), and how many directions are the first.

    The first directions are kept in the folder `cache`, where there is one: they are the same for all trainings.
    """

    before: Mapping[str, Tensor]
    top: int | None
    cache: Path | None = None

    @classmethod
    def of(cls, base: nn.Module, top: int | None, cache: Path | None = None) -> Updates:
        """Remember a base model's weights, as copies: a training in full changes them."""
        found = {
            path: as_matrix(module, module.get_parameter("weight").detach()).clone()
            for path, module in base.named_modules()
            if is_adaptable(module)
        }
        return cls(found, top, cache)

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Return `update`, the norm of all changes as a share of the weights' that changed, and `overlap`.

        Of a model with an adapter the adapted layers count, of one that trains in full all of them. `overlap` is the
        share of the squared norm of the change that touches the first `top` singular directions of its weight, on
        either side: 1 - ||(I - U U') dW (I - V V')||^2 / ||dW||^2.
        """
        changed = weights = outside = 0.0
        for path, old, change in self._changes(model):
            changed += float(change.square().sum())
            weights += float(old.square().sum())
            if self.top is not None:
                outside += float(self._outside(path, old, change).square().sum())
        found = {"update": math.sqrt(changed / weights) if weights else 0.0}
        if self.top is not None:
            found["overlap"] = max(0.0, 1 - outside / changed) if changed else 0.0
        return found

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
        first = cached_factors(weight, min(self.top, *weight.shape), "principal", path=path, cache=self.cache)
        left = change - first.U @ (first.U.T @ change)
        return left - (left @ first.Vh.T) @ first.Vh
