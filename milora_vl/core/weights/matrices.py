"""Which layer types an adapter supports, and a weight as one matrix (out, in): quantized, ZeRO-3, convolutions.

`read_matrix` returns the matrix of a plain weight, of a quantized one, and of a weight partitioned by ZeRO-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D


def is_adaptable(module: nn.Module) -> bool:
    """Return True if adapters support this type of layer: Linear, GPT-2's Conv1D, Conv2d or Embedding."""
    return isinstance(module, nn.Linear | Conv1D | nn.Conv2d | nn.Embedding)


def is_linear(module: nn.Module) -> bool:
    """Return True if the layer is a matrix product: Linear or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of the layer's matrix.

    The attributes of the module are used and not the shape of the weight, because quantized weights are packed and
    weights under ZeRO-3 are empty. A Conv2d has in = in_channels / groups * kh * kw, an Embedding (dim, tokens).
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
    """Return the layer's `weight` as a matrix (out, in). The result is a view."""
    if isinstance(module, Conv1D | nn.Embedding):
        return weight.T
    return weight.flatten(1)


def why_refused(module: nn.Module, method: str = "lora") -> str | None:
    """Return the kind of layer for which stock PEFT would compute this method wrongly, or None if it is correct."""
    if method not in ("lora", "dora") and isinstance(module, nn.Embedding):
        return f"an embedding with method {method}: use lora or full"
    if not isinstance(module, nn.Conv2d):
        return None
    if module.groups > 1:
        return f"a convolution in {module.groups} groups (PEFT cannot merge it)"
    if module.dilation != (1, 1) or module.padding_mode != "zeros":
        return f"a convolution with dilation {module.dilation}, padding {module.padding_mode} (PEFT ignores both)"
    return None


def read_matrix(module: nn.Module) -> Tensor:
    """Return the layer's weight (out, in), detached. It is a view of a plain weight, and a copy under ZeRO-3."""
    with torch.no_grad(), gather_params_ctx(list(module.parameters(recurse=False)), modifier_rank=None):
        weight = as_matrix(module, dequantize_module_weight(module).detach())
        return weight.clone() if is_deepspeed_zero3_enabled() else weight


@contextmanager
def gathered_in_forward(model: nn.Module) -> Iterator[None]:
    """Under ZeRO-3, gather the parameters of each module while its forward runs; otherwise do nothing.

    DeepSpeed gathers them only in models that train. All processes must run the same forward passes.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    open_modules: dict[nn.Module, Any] = {}

    def gather(module: nn.Module, _: Any) -> None:
        context = gather_params_ctx(list(module.parameters(recurse=False)), modifier_rank=None)
        context.__enter__()
        open_modules[module] = context

    def release(module: nn.Module, *_: Any) -> None:
        open_modules.pop(module).__exit__(None, None, None)

    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles: list[Any] = [module.register_forward_pre_hook(gather) for module in owners]
    handles += [module.register_forward_hook(release) for module in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(open_modules):  # an exception has ended their forward
            release(module)


def factor_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the anchor: the weight's own, or float32 for quantized weights."""
    dtype = module.get_parameter("weight").dtype
    return dtype if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) else torch.float32
