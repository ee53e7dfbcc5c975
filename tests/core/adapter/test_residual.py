"""The residual form: equal to the anchored one within the drift it reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from milora_vl import apply_milora, load_adapter, save_adapter
from milora_vl.core.adapter.errors import AdapterError
from milora_vl.core.adapter.install import lora_layer
from milora_vl.core.adapter.layers import ResidualA
from support.adapter_cases import Pictures, move, one_rule, token_batch, train_steps
from support.problems import raises_code

Q = "model.layers.0.self_attn.q_proj"


def residual(model: nn.Module, **fields: object):
    return apply_milora(model, one_rule(**fields), form="residual")


def test_the_base_weight_loses_its_minor_part_and_the_adapter_has_rank_r(tiny_llama) -> None:
    base, _ = tiny_llama()
    model = residual(tiny_llama()[0], alpha=6)
    layer = lora_layer(model, Q)
    W, W_p = base.get_submodule(Q).weight, layer.get_base_layer().weight
    S, S_p = torch.linalg.svdvals(W), torch.linalg.svdvals(W_p)
    assert torch.allclose(S_p[:-2], S[:-2], atol=1e-5)
    assert S_p[-2:].max() < 1e-6
    assert layer.lora_A["default"].weight.shape == (2, 64)
    assert isinstance(layer.lora_A["default"], ResidualA)
    assert torch.allclose(model(token_batch()).logits, base(token_batch()).logits, atol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_drift_is_measured_and_reported(tiny_llama, dtype: torch.dtype, most: float) -> None:
    base = tiny_llama()[0].to(dtype)
    model = residual(tiny_llama()[0].to(dtype))
    layer = lora_layer(model, Q)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    W = base.get_submodule(Q).weight.float()
    drift = (layer.get_base_layer().weight.float() + B @ A - W).norm() / W.norm()
    report = {r.path: r for r in model.milora_report}[Q]
    assert report.drift == pytest.approx(drift.item(), rel=1e-3)
    assert 0 < report.drift < most


def test_it_trains_as_the_anchored_form_does(tiny_llama) -> None:
    batch = {"input_ids": token_batch(200)}
    losses = [
        train_steps(apply_milora(tiny_llama()[0], one_rule(), form=form), batch, steps=5)
        for form in ("anchored", "residual")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] > losses[0][-1] + 0.01


def test_what_is_saved_is_the_rank_2r_adapter_of_the_untouched_base(tiny_llama, tmp_path: Path) -> None:
    model = residual(tiny_llama()[0])
    move(model)
    ids = token_batch(200)
    expected = model(ids).logits
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path))
    assert torch.allclose(stock(ids).logits, expected, atol=1e-5)
    assert torch.allclose(load_adapter(tiny_llama()[0], tmp_path)(ids).logits, expected, atol=1e-5)
    assert torch.allclose(model.merge_and_unload()(ids).logits, expected, atol=1e-5)


def test_training_goes_on_in_the_residual_form(tiny_llama, tmp_path: Path) -> None:
    batch = {"input_ids": token_batch(200)}
    model = residual(tiny_llama()[0])
    train_steps(model, batch)
    save_adapter(model, tmp_path)
    back = load_adapter(tiny_llama()[0], tmp_path, is_trainable=True)
    assert isinstance(lora_layer(back, Q).lora_A["default"], ResidualA)
    assert train_steps(back.train(), batch) == train_steps(model.train(), batch)
    again = residual(tiny_llama()[0])  # the HF Trainer's way: the same form on the same base, then load
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(
        again(**batch).logits, load_adapter(tiny_llama()[0], tmp_path, is_trainable=True)(**batch).logits
    )


def test_another_anchor_cannot_be_loaded_over_it(tiny_llama, tmp_path: Path) -> None:
    save_adapter(residual(tiny_llama()[0], method="random"), tmp_path)
    model = residual(tiny_llama()[0])
    with raises_code("adapter-wrong-anchor"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)


def test_what_would_show_the_changed_base_is_refused(tiny_llama) -> None:
    model = residual(tiny_llama()[0])
    for call in (
        lambda: model.disable_adapter().__enter__(),
        lambda: model.unload(),
        lambda: model.add_adapter("second", model.peft_config["default"]),
    ):
        with raises_code("adapter-residual-form", "form residual"):
            call()


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (
            Pictures(),
            {"modules": "patch"},
            "patch: .* linear layers only, this is a Conv2d",
        ),
        (
            Pictures(),
            {"modules": "words"},
            "words: .* linear layers only, this is a Embedding",
        ),
        (Pictures(), {"modules": "head", "sigma": "none"}, "head: .* sigma .* form anchored"),
    ],
)
def test_layers_and_fields_it_is_wrong_for_are_refused(model: nn.Module, fields, message: str) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with raises_code("adapter-residual-layer", says=message, kind=AdapterError):
        residual(model, **fields)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
