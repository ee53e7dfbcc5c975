"""A forward pass that adds the update to W x in one product computes what PEFT's forward computes, in every state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn

from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.adapter.lora import lora_layer
from support.adapter_cases import move

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
