"""The two products of an anchored layer, fused: one cast of the input, one product for each input's gradient.

Forward, the trained half and the anchor are multiplied separately, so that equal halves cancel to the last bit.
Backward, nothing has to cancel: the joined factor gives the input's gradient in one product, and the anchor has none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autocast
from torch.autograd.function import once_differentiable


def multiply_down(x: Tensor, trained: Tensor, anchor: Tensor) -> Tensor:
    """Return [A x, A0 x], (..., in) -> (..., 2r), in autocast's dtype if that is on, else in the trained half's."""
    return _Down.apply(x, trained, anchor, _dtype(x, trained))  # type: ignore[no-any-return,no-untyped-call]


def multiply_up(hidden: Tensor, trained: Tensor, anchor: Tensor) -> Tensor:
    """Return B h - B0 h0 of the two halves of `hidden`, (..., 2r) -> (..., out), in the dtype as above."""
    return _Up.apply(hidden, trained, anchor, _dtype(hidden, trained))  # type: ignore[no-any-return,no-untyped-call]


def _dtype(x: Tensor, trained: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else trained.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, anchor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = x.dtype, trained.dtype
        x, trained, anchor = x.to(dtype), trained.to(dtype), anchor.to(dtype)
        ctx.save_for_backward(x, trained, anchor)
        with autocast(x.device.type, enabled=False):
            return torch.cat([F.linear(x, trained), F.linear(x, anchor)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, trained, anchor = ctx.saved_tensors
        of_x = of_trained = None
        with autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_x = (grad @ torch.cat([trained, anchor])).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                of_trained = (_rows(grad[..., : len(trained)]).T @ _rows(x)).to(ctx.dtypes[1])
        return of_x, of_trained, None, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, trained: Tensor, anchor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = hidden.dtype, trained.dtype
        hidden, trained, anchor = hidden.to(dtype), trained.to(dtype), anchor.to(dtype)
        ctx.save_for_backward(hidden, trained, anchor)
        # Some CPU libraries round by how the memory is aligned: as copies both halves are aligned alike. The halves of
        # a single row are contiguous as they lie, so `contiguous` would not copy them.
        first, second = (half.clone(memory_format=torch.contiguous_format) for half in hidden.chunk(2, dim=-1))
        with autocast(hidden.device.type, enabled=False):
            return F.linear(first, trained).sub_(F.linear(second, anchor))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, trained, anchor = ctx.saved_tensors
        of_hidden = of_trained = None
        with autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_hidden = (grad @ torch.cat([trained, -anchor], dim=1)).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                of_trained = (_rows(grad).T @ _rows(hidden.chunk(2, dim=-1)[0])).to(ctx.dtypes[1])
        return of_hidden, of_trained, None, None
