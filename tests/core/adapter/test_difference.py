"""The difference form trains from zero and is stored as stock factors; its forward and gradients are PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn

from milora_vl.core.adapter.anchored import (
    DifferenceConv2d,
    DifferenceFactor,
    DifferenceLinear,
    join,
    multiply_down,
    multiply_up,
    recover,
)
from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.adapter.lora import lora_layer
from support.adapter_cases import move


def pair(
    rank: int = 3, dtype: torch.dtype = torch.float32, moved: float = 0.0
) -> tuple[DifferenceLinear, DifferenceLinear]:
    """The factors of a layer 8 -> 6; D and E are normal numbers times `moved`."""
    generator = torch.Generator().manual_seed(0)
    A0, B0 = torch.randn(rank, 8, generator=generator).to(dtype), torch.randn(6, rank, generator=generator).to(dtype)
    D, E = moved * torch.randn(rank, 8, generator=generator), moved * torch.randn(6, rank, generator=generator)
    A = DifferenceLinear.convert(nn.Linear(8, 2 * rank, bias=False), 0, D, A0)
    B = DifferenceLinear.convert(nn.Linear(2 * rank, 6, bias=False), 1, E, B0)
    return A, B


def update(A: DifferenceFactor, B: DifferenceFactor) -> Tensor:
    """B A - B0 A0 in float64."""
    A0, B0, D, E = (t.detach().double() for t in (A.anchor, B.anchor, A.delta, B.delta))
    return (B0 + E) @ (A0 + D) - B0 @ A0


@pytest.mark.parametrize("share", [1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("kind", ["autocast", "bf16 weights", "stock PEFT in bf16", "fp16 autocast"])
def test_the_update_keeps_its_digits_in_half_precision_at_every_size(kind: str, share: float) -> None:
    """The error against float64 is at most 0.005. `B A x - B0 A0 x` errs by 0.44 when the update is 1 % of the start.

    As in a real layer: the minor components of a weight, and D and E a share of the mean size of A0 and B0.
    """
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(256, 192, generator=generator) / 14
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    A0, B0 = (S[-16:].sqrt()[:, None] * Vh[-16:]).bfloat16(), (U[:, -16:] * S[-16:].sqrt()).bfloat16()
    D, E = (share * t.float().abs().mean() * torch.randn(t.shape, generator=generator) for t in (A0, B0))
    x = torch.randn(64, 192, generator=generator).bfloat16()
    if kind == "bf16 weights":
        D, E = D.bfloat16(), E.bfloat16()
    A = DifferenceLinear.convert(nn.Linear(192, 32, bias=False), 0, D, A0)
    B = DifferenceLinear.convert(nn.Linear(32, 256, bias=False), 1, E, B0)
    half = torch.float16 if kind.startswith("fp16") else torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", half, enabled="autocast" in kind):
        if kind.startswith("stock"):
            out = nn.functional.linear(nn.functional.linear(x, A.weight.bfloat16()), B.weight.bfloat16())
        else:
            out = B(A(x.to(half) if "autocast" in kind else x))
    assert out.dtype == half
    exact = x.double() @ update(A, B).T
    assert (out.double() - exact).norm() <= 0.005 * exact.norm()


def test_convolutions_compute_the_update_of_the_joined_factors() -> None:
    A0, B0 = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    stock = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(4, 5, 1, bias=False)
    A = DifferenceConv2d.convert(stock[0], 0, torch.zeros(2, 3, 3, 3), A0)
    B = DifferenceConv2d.convert(stock[1], 1, torch.zeros(5, 2, 1, 1), B0)
    x = torch.randn(1, 3, 9, 9)
    assert not B(A(x)).any()
    with torch.no_grad():
        A.delta += A0

    def convolved(A: Tensor, B: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.conv2d(x, A, stride=2, padding=1), B)

    assert torch.allclose(B(A(x)), convolved(A.weight, B.weight), atol=1e-4)
    assert torch.allclose(B(A(x)), convolved(2 * A0, B0) - convolved(A0, B0), atol=1e-4)


def test_only_the_difference_is_a_parameter_and_learns() -> None:
    A, B = pair()
    assert [name for name, _ in A.named_parameters()] == ["delta"]
    assert [name for name, _ in A.named_buffers()] == ["anchor"]
    before = A.anchor.clone()
    B(A(torch.randn(5, 8))).square().sum().backward()  # zero output, zero gradient
    B(A(torch.randn(5, 8))).sum().backward()
    assert A.delta.grad.any()
    assert B.delta.grad.any()
    torch.optim.SGD([*A.parameters(), *B.parameters()], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(A.anchor, before)


def test_state_dicts_hold_the_joined_weight_and_load_it_back() -> None:
    (A, B), (other_A, other_B) = pair(moved=1.0), pair()
    for factor, other in ((A, other_A), (B, other_B)):
        state = factor.state_dict()
        assert list(state) == ["weight"]
        other.load_state_dict(state)
        assert torch.equal(other.delta, factor.delta)
        assert torch.equal(other.anchor, factor.anchor)
    assert A.state_dict()["weight"].shape == (6, 8)
    nn.Linear(8, 6, bias=False).load_state_dict(A.state_dict())


def test_the_start_of_b_comes_back_by_rounding_or_is_kept_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    B0 = torch.randn(200, 30, generator=generator)
    E = 0.1 * torch.randn(200, 30, generator=generator)
    narrow = B0.bfloat16()
    assert torch.equal(recover(narrow + E, E, torch.bfloat16), narrow)
    assert recover(narrow + E, E, torch.bfloat16).dtype == torch.bfloat16
    found = recover(B0 + E, E, torch.bfloat16)
    assert found.dtype == torch.float32
    assert torch.allclose(found, B0, atol=1e-6)


def case(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 8), (3, 8), (3, 8), (6, 3), (6, 3))
    x, D, A0, E, B0 = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, D, A0, E, B0


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.double().pow(2).sum(), inputs)


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


def test_between_forward_and_backward_only_inputs_are_kept() -> None:
    x, D, A0, E, B0 = case(torch.float32)
    D.requires_grad_()
    E.requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        hidden = multiply_down(x, D, A0)
        multiply_up(hidden, E, B0)
    assert sorted(kept) == sorted(t.shape for t in (x, D, A0, hidden, E, B0))


WIDTH = 24


class Two(nn.Module):
    """Two layers with a bias (whose output is a view), or without; the first one gets an input without a gradient."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def adapted(*, bias: bool = False, dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    rule = {"modules": "*", "method": "milora", "protect": 0, "rank": 4, "alpha": 6, **fields}
    model = apply_milora(Two(bias=bias).to(dtype), [rule])
    move(model, 0.1)
    return model


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))


@contextmanager
def stock_forward(model: PeftModel) -> Iterator[None]:
    """Let PEFT's own products run."""
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    variants = [layer.lora_variant for layer in layers]
    for layer in layers:
        layer.lora_variant = {}
    yield
    for layer, variant in zip(layers, variants, strict=True):
        layer.lora_variant = variant


def result(model: PeftModel, x: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    """Return the output and all gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(2)  # dropout
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = model(x)
    out.float().square().sum().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, False, 1e-6),
        (torch.float32, True, 0.02),
        (torch.bfloat16, True, 0.02),
        (torch.bfloat16, False, 0.02),
        (torch.float64, False, 1e-12),
    ],
)
def test_outputs_and_gradients_are_those_of_pefts_forward(
    bias: bool, dtype: torch.dtype, autocast: bool, tolerance: float
) -> None:
    model, x = adapted(bias=bias, dtype=dtype), batch(3, 5).to(dtype)
    ours = result(model, x, autocast=autocast)
    with stock_forward(model):
        stock = result(model, x, autocast=autocast)
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        assert ours[name].dtype == expected.dtype, name
        assert (ours[name] - expected).float().norm() <= tolerance * expected.float().norm(), name


def test_dropout_is_applied_to_the_update_alone() -> None:
    model = adapted(dropout=0.5).train()
    ours = result(model, batch(6))
    with stock_forward(model):
        stock = result(model, batch(6))
    torch.testing.assert_close(ours, stock)


def states() -> dict[str, Callable[[PeftModel], Any]]:
    def another(model: PeftModel) -> None:
        model.add_adapter("other", lora.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        model.set_adapter("other")

    def both(model: PeftModel) -> None:
        another(model)
        model.base_model.set_adapter(["default", "other"])

    return {
        "merged": lambda model: model.merge_adapter(),
        "disabled": lambda model: model.base_model.disable_adapter_layers(),
        "another adapter": another,
        "two adapters": both,
    }


@pytest.mark.parametrize("state", states())
def test_every_other_state_is_pefts(state: str) -> None:
    model, x = adapted(), batch(5)
    plain = model(x)
    states()[state](model)
    out = model(x)
    with stock_forward(model):
        torch.testing.assert_close(out, model(x))
    assert torch.allclose(out, plain, atol=1e-5) == (state == "merged")


@pytest.mark.parametrize(
    "hook",
    [
        lambda up: up.register_forward_pre_hook(lambda module, args: args[0] * 0.5),
        lambda up: up.register_forward_hook(lambda module, args, out: out * 0.5),
        lambda up: up.register_full_backward_hook(lambda module, of_input, of_output: (of_input[0] * 0.5,)),
        lambda up: up.register_full_backward_pre_hook(lambda module, of_output: (of_output[0] * 0.5,)),
    ],
)
def test_a_hook_on_lora_b_sees_the_update_alone(hook: Callable[[nn.Module], Any]) -> None:
    model, x = adapted(), batch(5)
    hook(lora_layer(model, "first").lora_B["default"])
    ours = result(model, x)
    with stock_forward(model):
        torch.testing.assert_close(ours, result(model, x))
