"""The error of the adapter's output in bfloat16, before it is added to W x, in three forms of one function.

difference   s ((B0 + E) D x + E A0 x)     ours: D = A - A0 and E = B - B0 train
halves       s (B A x - B0 A0 x)            two products that cancel
residual     W_p x + s B A x - W x          the paper's (arXiv:2406.09044): W_p = W - s B0 A0, rounded
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milora_vl.core.adapter.anchored import DifferenceLinear
from milora_vl.core.svd import decompose

WIDTH, RANK, TOKENS, HALF = 256, 16, 64, torch.bfloat16


@pytest.mark.parametrize("trained", [torch.float32, HALF], ids=["autocast", "weights"])
@pytest.mark.parametrize("share", [1e-3, 1e-2, 1e-1, 1.0])
def test_the_difference_form_keeps_its_digits_where_the_other_forms_do_not(share: float, trained: torch.dtype) -> None:
    """`share` is the mean size of D and E, relative to A0 and B0; `trained` the dtype of what trains."""
    random = torch.Generator().manual_seed(0)
    W = (torch.randn(WIDTH, WIDTH, generator=random) / WIDTH**0.5).to(HALF)
    A0, B0 = (start.to(HALF) for start in decompose(W.float(), RANK, "minor", generator=random).lora(1.0))
    D, E = (share * s.float().abs().mean() * torch.randn(s.shape, generator=random) for s in (A0, B0))
    x = torch.randn(TOKENS, WIDTH, generator=random).to(HALF)
    down = DifferenceLinear.convert(nn.Linear(WIDTH, 2 * RANK, bias=False), 0, D.to(trained), A0)
    up = DifferenceLinear.convert(nn.Linear(2 * RANK, WIDTH, bias=False), 1, E.to(trained), B0)
    A, B = (A0.float() + D).to(trained), (B0.float() + E).to(trained)
    exact = x.double() @ ((B0.double() + E.double()) @ (A0.double() + D.double()) - B0.double() @ A0.double()).T

    def error(output: Tensor) -> float:
        return float((output - exact).norm() / exact.norm())

    with torch.no_grad(), torch.autocast("cpu", HALF):
        difference = up(down(x)).double()
        whole = F.linear(F.linear(x, A), B)
        halves = (whole - F.linear(F.linear(x, A0), B0)).double()
        stock = F.linear(F.linear(x, torch.cat([D, A0]).to(HALF)), torch.cat([B0 + E, E], dim=1).to(HALF)).double()
    W_p = (W.float() - B0.float() @ A0.float()).to(HALF)
    residual = whole.double() + x.double() @ (W_p.double() - W.double()).T
    assert error(difference) <= 0.005
    assert error(stock) <= 0.005, "a server computes the saved LoRA of rank 2r"
    assert share > 0.1 or error(halves) > 5 * error(difference)
    assert error(residual) > 0.1
