"""Layer kinds an adapter can sit on, and their weight as one matrix (out, in) in PEFT's orientation.

`read_matrix` reads it whatever holds it: a plain weight, a quantised one, or one that ZeRO-3 has partitioned.
"""

from __future__ import annotations

import math

import torch
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D


def is_adaptable(module: nn.Module) -> bool:
    """Tell whether an adapter can sit on this kind of layer (Linear, GPT-2's Conv1D, Conv2d, Embedding)."""
    return isinstance(module, nn.Linear | Conv1D | nn.Conv2d | nn.Embedding)


def is_linear(module: nn.Module) -> bool:
    """Tell whether the layer is a matrix product: Linear or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of the layer's matrix, without its tensors: those are packed where it is quantised, and empty
    where ZeRO-3 has cut it up.
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)
    assert isinstance(module, nn.Embedding)
    return module.embedding_dim, module.num_embeddings


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return `weight` of the layer as its matrix (out, in): a view, nothing is copied."""
    if isinstance(module, Conv1D | nn.Embedding):
        return weight.T
    return weight.flatten(1)


def why_refused(module: nn.Module, method: str = "lora") -> str | None:
    """Return why an adapter of a method on this layer would be wrong in stock PEFT, None if it is right."""
    if method in ("olora", "mica") and not is_linear(module):
        return f"a layer of kind {type(module).__name__} with method {method}, which is for linear layers"
    if method == "mica" and not next(module.parameters()).is_floating_point():
        return "a quantised layer with method mica (PEFT reads float weights for it)"
    if not isinstance(module, nn.Conv2d):
        return None
    if module.groups > 1:
        return f"a convolution in {module.groups} groups (PEFT cannot merge it)"
    if module.dilation != (1, 1) or module.padding_mode != "zeros":
        return f"a convolution with dilation {module.dilation}, padding {module.padding_mode} (PEFT drops both)"
    return None


def read_matrix(module: nn.Module) -> Tensor:
    """Return the layer's weight (out, in), detached: a view where it is plain, a copy where it had to be gathered."""
    with torch.no_grad(), gather_params_ctx(list(module.parameters(recurse=False)), modifier_rank=None):
        weight = as_matrix(module, dequantize_module_weight(module).detach())
        return weight.clone() if is_deepspeed_zero3_enabled() else weight


def factor_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype anchors are kept in: the weight's own, float32 where that is no dtype to train in."""
    dtype = module.get_parameter("weight").dtype
    return dtype if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) else torch.float32
