"""The residual form, as the paper writes it: the base weight becomes W_p = W - s B0 A0, A and B train at rank r.

Saves the anchor's multiplications; in a half-precision base W_p is rounded, and the drift says by how much.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora_vl.lora.errors import AdapterError
from milora_vl.lora.layers import Halves, ResidualA, ResidualB
from milora_vl.weights.matrices import as_matrix


def require_residual(model: nn.Module, paths: list[str]) -> None:
    """Raise AdapterError where the residual form is no choice: quantised weights, layers that are no matrix product."""
    for path in paths:
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear | Conv1D):
            raise AdapterError(f"{path}: form residual is for linear layers, this is a {type(module).__name__}")
        if type(module.weight) is not nn.Parameter or not module.weight.dtype.is_floating_point:
            raise AdapterError(f"{path}: form residual needs an unquantised base; use form anchored")


@torch.no_grad()
def make_residual(layer: LoraLayer, adapter: str) -> float:
    """Move the anchor of a layer in halves into its base weight and return the drift.

    The drift is ||W_p + s B0 A0 - W||_F / ||W||_F: what rounding W_p to the weight's dtype loses.
    """
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    assert isinstance(first, Halves)
    assert isinstance(second, Halves)
    base = layer.get_base_layer()
    weight = as_matrix(base, base.get_parameter("weight").data)  # a view: writing into it changes the layer
    W = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    minor = minor_part(first.anchor, second.anchor, layer.scaling[adapter])
    weight.copy_(W - minor)
    first.__class__, second.__class__ = ResidualA, ResidualB
    drift = torch.linalg.vector_norm(weight.to(W.dtype) + minor - W) / torch.linalg.vector_norm(W)
    return float(drift) if bool(W.any()) else 0.0


def minor_part(A0: Tensor, B0: Tensor, scaling: float) -> Tensor:
    """Return s B0 A0 (out, in) in float32."""
    return scaling * (B0.float() @ A0.float())
