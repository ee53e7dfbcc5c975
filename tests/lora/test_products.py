"""The fused products have the gradients of the joined factors, whose backward is torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from milora_vl.lora.layers import multiply_down, multiply_up


def case(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 8), (3, 8), (3, 8), (6, 3), (6, 3))
    x, A, A0, B, B0 = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, A, A0, B, B0


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.double().pow(2).sum(), inputs)


def test_outputs_and_gradients_are_those_of_the_joined_factors() -> None:
    x, A, A0, B, B0 = case(torch.float64)
    for tensor in (x, A, B):
        tensor.requires_grad_()
    ours = multiply_up(multiply_down(x, A, A0), B, B0)
    stock = x @ torch.cat([A, A0]).T @ torch.cat([B, -B0], dim=1).T
    torch.testing.assert_close(ours, stock)
    for got, expected in zip(gradients(ours, x, A, B), gradients(stock, x, A, B), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_keep_their_dtype_and_stay_close(dtype: torch.dtype) -> None:
    x, A, A0, B, B0 = case(torch.float32)
    x = x.to(dtype).requires_grad_()
    A.requires_grad_()
    B.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = multiply_up(multiply_down(x, A, A0), B, B0)
    assert out.dtype == torch.bfloat16
    exact = x.float() @ torch.cat([A, A0]).T @ torch.cat([B, -B0], dim=1).T
    for got, expected in zip(gradients(out, x, A, B), gradients(exact, x, A, B), strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= 0.03 * expected.norm()


def test_no_gradient_is_made_that_nobody_asked_for() -> None:
    x, A, A0, B, B0 = case(torch.float32)
    A.requires_grad_()
    (of_A,) = torch.autograd.grad(multiply_up(multiply_down(x, A, A0), B, B0).sum(), A)
    assert of_A.shape == A.shape
    assert not multiply_down(x, A.detach(), A0).requires_grad


def test_it_is_one_graph_for_torch_compile() -> None:
    x, A, A0, B, B0 = case(torch.float32)
    A.requires_grad_()

    def both(x: Tensor) -> Tensor:
        return multiply_up(multiply_down(x, A, A0), B, B0)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), both(x))
    torch.testing.assert_close(gradients(compiled(x), A), gradients(both(x), A))
