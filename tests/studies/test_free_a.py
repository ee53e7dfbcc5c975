"""A = C R: a trained A stays off the protected inputs under any optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from milora_vl.core.adapter.lora import lora_layer
from studies.free_a import Directions, _Product, free_directions, minor_start, train_inside

NUM_PROTECTED, RANK = 5, 3
V = torch.linalg.qr(torch.randn(16, NUM_PROTECTED, generator=torch.Generator().manual_seed(0))).Q
X, Y = (torch.randn(64, width, generator=torch.Generator().manual_seed(1)) for width in (16, 4))


def base() -> nn.Module:
    """Two layers that read the same input, and one that reads their sum."""
    torch.manual_seed(2)
    return nn.ModuleDict({"q": nn.Linear(16, 16), "k": nn.Linear(16, 16), "o": nn.Linear(16, 4)})


def forward(model: Any, x: Tensor) -> Tensor:
    out: Tensor = model["o"](torch.tanh(model["q"](x) + model["k"](x)))
    return out


def adapted() -> Any:
    """Let the A of all layers train off V, the first two with one R."""
    model = get_peft_model(base(), LoraConfig(r=RANK, lora_alpha=6, target_modules=list("qko")))
    of_input, of_sum = (Directions(free_directions(V, seed=seed)) for seed in (0, 1))
    for path in "qko":
        layer, R = lora_layer(model, path), of_sum if path == "o" else of_input
        train_inside(layer, "default", minor_start(layer.get_base_layer().weight.detach(), R.R, RANK), R)
    return model


def coordinates(model: Any) -> Tensor:
    C: Tensor = lora_layer(model, "q").lora_A["default"].C
    return C.detach()


def train(model: Any, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **about: Any) -> list[float]:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **about)
    losses = []
    for _ in range(8):
        loss = (forward(model.base_model.model, X) - Y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def outside(model: Any, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest share of any A along V; A is read under autocast to `dtype`."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        factors = [lora_layer(model, path).lora_A["default"].weight.detach() for path in "qko"]
    return max(float((A @ V).norm() / A.norm()) for A in factors)


@pytest.mark.parametrize(
    ("kind", "about"),
    [
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_trained_A_reads_nothing_of_the_protected_inputs(kind: type[torch.optim.Optimizer], about: Any) -> None:
    model = adapted()
    start = coordinates(model).clone()
    assert torch.equal(forward(model.base_model.model, X), forward(base(), X)), "step 0 is the base"
    losses = train(model, kind, **about)
    assert losses[-1] < losses[0]
    assert (coordinates(model) - start).norm() > 0.01 * start.norm(), "A trains"
    assert outside(model) < 1e-6


def test_a_model_in_half_precision_keeps_the_directions_in_float32() -> None:
    model = adapted().to(torch.bfloat16)
    assert coordinates(model).dtype == torch.bfloat16
    assert outside(model) < 1e-6, "directions rounded to bfloat16 would be off by a thousandth"
    assert outside(model, torch.bfloat16) < 1e-6, "A is formed in float32 under autocast too"


def test_the_gradient_of_C_is_exact_and_layers_with_one_input_share_R() -> None:
    C, R = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (4, 6)))
    assert torch.autograd.gradcheck(lambda one: _Product.apply(one, R), C.requires_grad_())
    model = adapted()
    assert len({id(module) for module in model.modules() if isinstance(module, Directions)}) == 2


def test_free_directions_are_orthonormal_off_the_inputs_and_the_start_is_minor_inside_them() -> None:
    R = free_directions(V)
    assert len(R) == 16 - NUM_PROTECTED
    assert torch.allclose(R @ R.T, torch.eye(len(R)), atol=1e-6)
    assert (R @ V).norm() < 1e-6
    W = base()["q"].weight.detach()
    C = minor_start(W, R, RANK)
    lengths = torch.linalg.vector_norm(W @ (C @ R).T, dim=0) / torch.linalg.vector_norm(C, dim=1)
    assert torch.allclose(lengths, torch.linalg.svdvals(W @ R.T)[-RANK:], atol=1e-5)
