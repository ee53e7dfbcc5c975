"""`keep_protected`: the steps of every optimizer are projected; a training without it stops at its first gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from milora_vl import apply_milora, keep_protected, reinit_peft, save_adapter
from milora_vl.adapter.install import lora_layer, trained_factors
from milora_vl.adapter.protection import Directions, Protected
from milora_vl.policy.rules import Protect
from support.adapter_cases import move, one_rule
from support.problems import raises_code

BATCHES = [{"input": torch.randn(20, 12, generator=torch.Generator().manual_seed(i))} for i in range(2)]


def small(method: str = "milora") -> Any:
    torch.manual_seed(0)
    rules = one_rule(method=method, protect={"inputs": 0.6})
    model = apply_milora(nn.Sequential(nn.Linear(12, 10, bias=False)), rules, calibration=BATCHES)
    with torch.no_grad():  # E or B starts at zero, so the input factor has no gradient at first
        trained_factors(lora_layer(model, "0"), "default")[1].normal_()
    return model


def optimizer_of(model: nn.Module, kind: type = torch.optim.AdamW) -> torch.optim.Optimizer:
    return kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def gradient(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(1, 12)).square().sum().backward()


def overlap(model: Any, adapter: str = "default") -> float:
    factor = trained_factors(lora_layer(model, "0"), adapter)[0]
    assert factor.any()
    return float(model.protections[adapter]["0"].overlap(factor))


def test_training_that_protects_nothing_is_refused_at_its_first_gradient() -> None:
    with raises_code("adapter-not-protected", hint="keep_protected(model, optimizer)"):
        gradient(small())


@pytest.mark.parametrize("method", ["milora", "lora"])
def test_a_step_that_was_not_projected_stops_the_training(method: str) -> None:
    model = small(method)
    kept, other = optimizer_of(model), optimizer_of(model)
    keep_protected(model, kept)
    gradient(model)
    kept.step()
    gradient(model)
    other.step()
    assert overlap(model) > 1e-3
    with raises_code("adapter-not-protected", hint="every optimizer"):
        gradient(model)
    keep_protected(model, other)
    keep_protected(model, other)  # a second time changes nothing
    for optimizer in (other, kept, other):
        gradient(model)
        optimizer.step()
    gradient(model)
    assert overlap(model) < 1e-5


def test_a_second_adapter_needs_protection_of_its_own() -> None:
    model = small()
    optimizer = optimizer_of(model)
    keep_protected(model, optimizer)
    gradient(model)
    optimizer.step()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    with raises_code("adapter-not-protected"):
        gradient(model)
    ours, theirs = (model.protections[name]["0"] for name in ("default", "second"))
    assert ours.directions is theirs.directions  # they are in memory once
    optimizer.add_param_group({"params": list(trained_factors(lora_layer(model, "0"), "second"))})
    keep_protected(model, optimizer)
    for name in ("default", "second"):
        model.set_adapter(name)
        for _ in range(2):  # E of the second adapter starts at zero
            gradient(model)
            optimizer.step()
        assert overlap(model, name) < 1e-5


def test_a_copy_of_a_model_is_guarded_too(tmp_path: Path) -> None:
    model = small()
    optimizer = optimizer_of(model)
    keep_protected(model, optimizer)
    twin, both = copy.deepcopy((model, optimizer))
    with raises_code("adapter-not-protected"):
        gradient(twin)
    keep_protected(twin, both)
    gradient(twin)
    gradient(model)  # the copy does not change what holds for the model
    torch.save(model, tmp_path / "model.pt")
    with raises_code("adapter-not-protected"):
        gradient(torch.load(tmp_path / "model.pt", weights_only=False))


def test_an_optimizer_that_steps_other_tensors_is_refused() -> None:
    """As DeepSpeed's, which puts flat parts of the factors in their place."""
    model = small()
    with raises_code("adapter-sharded-optimizer"):
        keep_protected(model, torch.optim.AdamW([nn.Parameter(torch.ones(3))]))
    optimizer = optimizer_of(model)
    keep_protected(model, optimizer)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(3))]
    with raises_code("adapter-sharded-optimizer"):
        optimizer.step()


def test_an_optimizer_that_accelerate_has_wrapped_is_kept_too() -> None:
    model = small()
    tuned, optimizer = Accelerator(cpu=True).prepare(model, optimizer_of(model))
    keep_protected(tuned, optimizer)
    gradient(tuned)
    optimizer.step()
    assert overlap(model) < 1e-5


def test_saving_warns_of_an_update_that_reaches_inside(tmp_path: Path) -> None:
    model = small()
    save_adapter(model, tmp_path)
    move(model)
    with pytest.warns(UserWarning, match="reaches into protected directions .1 modules of"):
        save_adapter(model, tmp_path)


def test_a_fresh_lora_of_anyone_is_unprotected() -> None:
    from peft import LoraConfig, get_peft_model

    stock = get_peft_model(nn.Sequential(nn.Linear(12, 10)), LoraConfig(r=2, target_modules=["0"]))
    keep_protected(stock, optimizer_of(stock))
    assert reinit_peft(stock).protections == {"default": {}}


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), width=st.integers(2, 9), count=st.integers(1, 4), seed=st.integers(0, 999))
def test_removing_twice_is_removing_once_and_leaves_the_rest(rows: int, width: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, min(count, width), generator=generator)).Q
    protected = Protected("x", Protect(inputs=0.5), Directions(basis), 0.5)
    A = torch.randn(rows, width, generator=generator)
    once = A.clone()
    protected.remove(once)
    assert protected.overlap(once) < 1e-4 or once.norm() < 1e-4
    assert torch.allclose(once + protected.inside(A), A, atol=1e-5)
    twice = once.clone()
    protected.remove(twice)
    assert torch.allclose(once, twice, atol=1e-5)
