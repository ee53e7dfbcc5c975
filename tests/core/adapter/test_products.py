"""The fused products have the gradients of the joined factors, whose backward is torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from milora_vl.core.adapter.anchored import join, multiply_down, multiply_up


def case(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 8), (3, 8), (3, 8), (6, 3), (6, 3))
    x, D, A0, E, B0 = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, D, A0, E, B0


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.double().pow(2).sum(), inputs)


def test_outputs_and_gradients_are_those_of_the_joined_factors() -> None:
    x, D, A0, E, B0 = case(torch.float64)
    for tensor in (x, D, E):
        tensor.requires_grad_()
    ours = multiply_up(multiply_down(x, D, A0), E, B0)
    stock = x @ join(D, A0, 0).T @ join(E, B0, 1).T
    torch.testing.assert_close(ours, stock)
    for got, expected in zip(gradients(ours, x, D, E), gradients(stock, x, D, E), strict=True):
        torch.testing.assert_close(got, expected)


def test_gradients_are_those_of_a_and_b_in_the_product_minus_its_start() -> None:
    x, D, A0, E, B0 = case(torch.float64)
    A, B = (A0 + D).requires_grad_(), (B0 + E).requires_grad_()
    D.requires_grad_()
    E.requires_grad_()
    ours = multiply_up(multiply_down(x, D, A0), E, B0)
    paper = x @ A.T @ B.T - x @ A0.T @ B0.T
    torch.testing.assert_close(ours, paper)
    for got, expected in zip(gradients(ours, D, E), gradients(paper, A, B), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_keep_their_dtype_and_stay_close(dtype: torch.dtype) -> None:
    x, D, A0, E, B0 = case(torch.float32)
    x = x.to(dtype).requires_grad_()
    D.requires_grad_()
    E.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = multiply_up(multiply_down(x, D, A0), E, B0)
    assert out.dtype == torch.bfloat16
    exact = x.float() @ join(D, A0, 0).T @ join(E, B0, 1).T
    for got, expected in zip(gradients(out, x, D, E), gradients(exact, x, D, E), strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= 0.03 * expected.norm()


def test_float32_factors_on_a_bfloat16_base_multiply_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    x, D, A0, E, B0 = (torch.randn(s, generator=generator) for s in ((64, 128), (8, 128), (8, 128), (96, 8), (96, 8)))
    x, A0, B0 = x.bfloat16().requires_grad_(), A0.bfloat16(), B0.bfloat16()
    D, E = (0.01 * D).requires_grad_(), (0.01 * E).requires_grad_()
    out = multiply_up(multiply_down(x.float(), D, A0), E, B0)  # PEFT casts the input
    exact = x.double() @ join(D, A0, 0, torch.float64).T @ join(E, B0, 1, torch.float64).T
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() <= 0.005 * exact.norm()
    for got, expected in zip(gradients(out, x, D, E), gradients(exact, x, D, E), strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= 0.01 * expected.norm()


def test_no_gradient_is_made_that_nobody_asked_for() -> None:
    x, D, A0, _, _ = case(torch.float32)
    D.requires_grad_()
    (of_D,) = torch.autograd.grad(multiply_down(x, D, A0).sum(), D)
    assert of_D.shape == D.shape
    assert not multiply_down(x, D.detach(), A0).requires_grad


def test_between_forward_and_backward_only_inputs_are_kept() -> None:
    x, D, A0, E, B0 = case(torch.float32)
    D.requires_grad_()
    E.requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        hidden = multiply_down(x, D, A0)
        multiply_up(hidden, E, B0)
    assert sorted(kept) == sorted(t.shape for t in (x, D, A0, hidden, E, B0))


def test_it_is_one_graph_for_torch_compile() -> None:
    x, D, A0, E, B0 = case(torch.float32)
    D.requires_grad_()

    def both(x: Tensor) -> Tensor:
        return multiply_up(multiply_down(x, D, A0), E, B0)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), both(x))
    torch.testing.assert_close(gradients(compiled(x), D), gradients(both(x), D))
