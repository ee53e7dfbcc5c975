"""Fixed A, the default: a LoRA whose down factor never changes, so its update stays off the protected inputs.

    y = W x + s B A x          A (r, in) is a buffer with A V = 0, B (out, r) trains from zero

V (in, k) holds the input directions that ordinary text and pictures use; `choose_a.py` chooses A off them. The update
s B A vanishes on them at every step by construction: under any optimizer and in any trainer, without a hook and without
V in memory.

PEFT creates a stock LoRA, and `fix_A` makes its A a buffer of the same name. A buffer, because PEFT switches
`requires_grad` on for each parameter of an adapter. Files, state dicts, merging and the PeftModel are PEFT's own.

>>> from peft import LoraConfig, get_peft_model
>>> from torch import nn
>>> model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(r=2, target_modules=["0"]))
>>> layer = model.base_model.model[0]
>>> fix_A(layer, "default", torch.ones(2, 3))
>>> [name for name, p in layer.named_parameters() if p.requires_grad]
['lora_B.default.weight']
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, autocast

from milora_vl.common.compat.peft import ForwardVariant, set_variant


def fix_A(layer: LoraLayer, adapter: str, A: Tensor | None = None) -> None:
    """Make the A of an adapter a buffer that never changes: `A` (r, in), or the A that the layer has."""
    down = layer.lora_A[adapter]
    stock = down.get_parameter("weight")
    A = stock.detach() if A is None else A.to(stock).reshape(stock.shape).contiguous()  # the kernels of a convolution
    del down.weight
    down.register_buffer("weight", A)
    if type(layer) is lora.Linear:  # a quantized layer or a subclass keeps its own forward
        set_variant(layer, adapter, FixedA())


def has_fixed_A(layer: LoraLayer, adapter: str) -> bool:
    """Return True if the A of `adapter` is a buffer in this layer."""
    return adapter in layer.lora_A and "weight" in dict(layer.lora_A[adapter].named_buffers(recurse=False))


class FixedA(ForwardVariant):
    """The forward pass of PEFT's LoRA layer, where the product with B adds to W x.

    A passes no gradient, so x is not kept for the backward pass. Beside a bfloat16 base PEFT would multiply in float32,
    and round the sum anyway. Beside float16 the products are in float32, as PEFT's, under autocast too.
    """

    def update(self, down: Any, up: Any, x: Tensor, onto: Tensor, scaling: float, drops: bool) -> Tensor:
        """Return y = W x + s B A x for `onto` (..., out), the output W x of the base layer."""
        # PEFT has cast x, which the dtype of `onto` undoes; dropout divides by 1 - p, in float32
        return plus_update(onto, x, down.weight, up.weight, scaling, x.dtype if drops else onto.dtype)


def plus_update(onto: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, first: torch.dtype) -> Tensor:
    """Return `onto` + s B A x in the dtype of `onto` (..., out); `first` is the dtype of A x without autocast."""
    device = onto.device.type
    if onto.dtype == torch.float16:  # A x can leave its range, and infinity times B = 0 is NaN
        first = dtype = torch.float32
    elif torch.is_autocast_enabled(device):
        first = dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.bfloat16 if onto.dtype == torch.bfloat16 else B.dtype
    with autocast(device, enabled=False):
        hidden, B = _rows(F.linear(x.to(first), A.to(first))).to(dtype), B.to(dtype)
        if onto.dtype == dtype:
            return torch.addmm(_rows(onto), hidden, B.T, alpha=scaling).view(onto.shape)
        return (onto + scaling * F.linear(hidden, B).view(onto.shape)).to(onto.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
