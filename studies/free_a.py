"""A that trains inside the free directions: a LoRA whose A = C R leaves the protected inputs alone at every step.

    y = W x + s B C R x        R (m, in) is frozen, C (r, m) and B (out, r) train

The rows of R are orthonormal and off the protected inputs V (in, k), so A V = C R V = 0 under any optimizer. The layers
that read one input share R. A is formed once per forward in full float32 and then used as A: R rounded to bfloat16 is
off V by a thousandth only.

PEFT creates a stock LoRA, and `train_inside` replaces the weight of its A by C. PEFT reads and merges A multiplied out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from milora_vl.common.compat.peft import set_variant
from milora_vl.common.compat.torch import change_class
from milora_vl.core.adapter.fixed_a import ROW_LENGTH, FixedA
from milora_vl.core.svd.gram import full_precision


class Directions(nn.Module):
    """R (m, in): orthonormal rows that never change. Layers with the same input share the module."""

    bits: Tensor

    def __init__(self, R: Tensor) -> None:
        super().__init__()
        # Trainers cast the floating-point buffers of a model to bfloat16, and leave integers alone.
        self.register_buffer("bits", R.float().contiguous().view(torch.int32), persistent=False)

    @property
    def R(self) -> Tensor:
        return self.bits.view(torch.float32)


class FreeFactor(nn.Linear):
    """PEFT's `lora_A[name]` with the trained C (r, m) in the place of its weight, which is A = C R (r, in)."""

    C: nn.Parameter
    directions: Directions

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return _Product.apply(self.C, self.directions.R)  # type: ignore[no-any-return,no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _Product(torch.autograd.Function):
    """A = C R with the gradient of C, dC = dA R'; both products are in full precision."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(R)
        ctx.dtype = C.dtype
        with full_precision(C.device):
            return C.to(R) @ R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (R,) = ctx.saved_tensors
        with full_precision(grad.device):
            return (grad.to(R) @ R.T).to(ctx.dtype), None


def train_inside(layer: LoraLayer, adapter: str, C: Tensor, directions: Directions) -> None:
    """Let an adapter of a linear layer train C (r, m) in place of its A (r, in)."""
    down = layer.lora_A[adapter]
    stock = down.get_parameter("weight")
    del down.weight
    factor = change_class(down, FreeFactor)
    factor.directions = directions
    factor.C = nn.Parameter(C.to(stock.device, torch.float32), requires_grad=stock.requires_grad)
    if type(layer) is lora.Linear:  # a quantized layer or a subclass keeps its own forward
        set_variant(layer, adapter, FixedA())


def free_directions(V: Tensor, count: int | None = None, *, seed: int = 0) -> Tensor:
    """Return R (m, in): `count` random directions off V (in, k) in float32, or all if that is more.

    >>> free_directions(torch.tensor([[1.0], [0.0]])).abs()
    tensor([[0., 1.]])
    """
    size, taken = V.shape
    count = size - taken if count is None else min(count, size - taken)
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    with full_precision(V.device):
        Q = rows.to(V.device).T
        for _ in range(3):  # the first pass leaves what rounding adds to nearly dependent rows
            Q = torch.linalg.qr(Q - V @ (V.T @ Q)).Q
    return Q.T.contiguous()


def minor_start(W: Tensor, R: Tensor, rank: int) -> Tensor:
    """Return C (r, m): the last right singular vectors of W (out, in) inside R (m, in), of length ROW_LENGTH."""
    with full_precision(W.device):
        Vh = torch.linalg.svd(W.float() @ R.T, full_matrices=False).Vh
    return ROW_LENGTH * Vh[-rank:]
