"""The residual form, as in the paper: y = W_p x + s B A x, where the base weight is replaced by W_p = W - s B0 A0.

A and B train at rank r, so a step costs no more than a plain LoRA. The price is a base weight that changes: W_p is
rounded to its dtype, and the drift measures that error.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora_vl.common.compat.torch import change_class
from milora_vl.core.adapter.errors import AdapterError
from milora_vl.core.adapter.layers import Halves, ResidualA, ResidualB
from milora_vl.core.weights.matrices import as_matrix


def require_residual(model: nn.Module, paths: list[str]) -> None:
    """Raise AdapterError for layers that the residual form does not support: quantized ones, and all but linear."""
    for path in paths:
        module = model.get_submodule(path)
        is_plain = type(module.weight) is nn.Parameter and module.weight.dtype.is_floating_point
        if not is_plain or not isinstance(module, nn.Linear | Conv1D):
            raise AdapterError(
                f"form residual supports unquantized linear layers only, this is a {type(module).__name__}",
                code="adapter-residual-layer",
                where=path,
                hint="use form anchored",
            )


@torch.no_grad()
def make_residual(layer: LoraLayer, adapter: str) -> float:
    """Subtract the anchor of a layer from its base weight, in place, and return the drift.

    The drift is ||W_p + s B0 A0 - W||_F / ||W||_F, the error of rounding W_p to the weight's dtype.
    """
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    assert isinstance(first, Halves)
    assert isinstance(second, Halves)
    base = layer.get_base_layer()
    weight = as_matrix(base, base.get_parameter("weight").data)  # a view: writing into it changes the layer
    W = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    minor = minor_part(first.anchor, second.anchor, layer.scaling[adapter])
    weight.copy_(W - minor)
    change_class(first, ResidualA)
    change_class(second, ResidualB)
    drift = torch.linalg.vector_norm(weight.to(W.dtype) + minor - W) / torch.linalg.vector_norm(W)
    return float(drift) if bool(W.any()) else 0.0


def minor_part(A0: Tensor, B0: Tensor, scaling: float) -> Tensor:
    """Return s B0 A0 (out, in) in float32."""
    return scaling * (B0.float() @ A0.float())
