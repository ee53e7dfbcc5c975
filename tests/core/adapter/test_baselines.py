"""DoRA, OLoRA, MiCA for a whole run; rsLoRA; budgets; and all faults of a policy in one message."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from milora_vl import apply_milora, load_adapter, save_adapter
from milora_vl.core.policy import PolicyError
from support.adapter_cases import anchors, one_rule, token_batch, train_steps
from support.versions import PEFT, needs_mica

Q = "model.layers.0.self_attn.q_proj"
IDS = token_batch(200)


def test_olora_starts_where_pefts_does(tiny_llama) -> None:
    ours = apply_milora(tiny_llama()[0], one_rule(method="olora"))
    names = [t.path for t in ours.milora_targets]
    theirs = get_peft_model(
        tiny_llama()[0], LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights="olora")
    )
    for path in names:
        here, there = (m.get_base_model().get_submodule(path) for m in (ours, theirs))
        assert torch.allclose(here.lora_A["default"].anchor, there.lora_A["default"].weight, atol=1e-5)
        assert torch.allclose(here.lora_B["default"].anchor, there.lora_B["default"].weight, atol=1e-5)
    report = ours.milora_report[0]
    assert report.svd == "olora"
    assert 0 < report.sigma_min <= report.sigma_max <= report.sigma_top
    assert anchors(ours)


@needs_mica
def test_mica_trains_one_factor_alone(tiny_llama) -> None:
    trained = [
        n for n, p in apply_milora(tiny_llama()[0], one_rule(method="mica")).named_parameters() if p.requires_grad
    ]
    assert trained
    assert all("lora_A" in name for name in trained)


@pytest.mark.skipif(PEFT >= (0, 20), reason="this PEFT has MiCA")
def test_mica_needs_a_peft_that_has_it(tiny_llama) -> None:
    fault, _ = faults(tiny_llama()[0], one_rule(method="mica"))
    assert fault == f"policy: method mica needs peft 0.20 or newer, found {version('peft')}"


def faults(model: nn.Module, rules) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        apply_milora(model, rules)
    return str(caught.value).splitlines()


def test_baselines_do_not_mix_and_need_linear_layers(tiny_llama) -> None:
    rules = [*one_rule(method="dora"), {"modules": "language.mlp", "method": "milora"}]
    message = "policy: dora is a baseline for a whole run, it does not mix with milora"
    assert faults(tiny_llama()[0], rules) == [message, "use dora in all rules that have an adapter"]
    rules = [{"modules": "*embed_tokens", "method": "olora", "rank": 2}]
    assert "no adapter on a layer of type Embedding with method olora" in faults(tiny_llama()[0], rules)[0]


@pytest.mark.parametrize("method", ["milora", "lora"])
def test_rslora_scales_by_the_root_of_the_rank(tiny_llama, tmp_path: Path, method: str) -> None:
    model = apply_milora(tiny_llama()[0], one_rule(method=method, rank=4, alpha=6, rslora=True))
    config, doubled = model.peft_config["default"], 2 if method == "milora" else 1
    assert config.use_rslora
    assert config.lora_alpha == pytest.approx(6 * doubled**0.5)  # alpha sqrt(2) at rank 2r
    assert model.get_submodule(f"base_model.model.{Q}").scaling["default"] == pytest.approx(3)
    assert torch.allclose(model.eval()(IDS).logits, tiny_llama()[0](IDS).logits, atol=1e-6)
    train_steps(model, {"input_ids": IDS})
    save_adapter(model, tmp_path)
    back = load_adapter(tiny_llama()[0], tmp_path, is_trainable=True)
    assert torch.allclose(back.eval()(IDS).logits, model.eval()(IDS).logits, atol=1e-5)
    assert back.milora_targets[0].scaling == 3


def test_rslora_in_some_rules_alone(tiny_llama) -> None:
    rules = [
        *one_rule(rank=4, alpha=6),
        {"modules": "language.q_proj", "rslora": True},
        {"modules": "language.k_proj", "rank": 16},
    ]
    model = apply_milora(tiny_llama()[0], rules)
    scaling = {t.path.split(".")[-1]: t.scaling for t in model.milora_targets}
    assert (scaling["q_proj"], scaling["k_proj"], scaling["up_proj"]) == (3, 1.5, 1.5)
    assert not model.peft_config["default"].use_rslora
    for target in model.milora_targets:
        layer = model.get_submodule(f"base_model.model.{target.path}")
        assert layer.scaling["default"] == pytest.approx(target.scaling)


def test_all_faults_of_reading_come_together_and_then_all_of_the_model(tiny_llava) -> None:
    rules = [
        {"modules": "language", "method": "milora", "rank": 0, "lr": 1e-4},
        {"modules": "langauge.mlp", "method": "milora", "rank": 4},
        {"modules": "language.attention", "method": "milora", "rank": 65},
        {"modules": "projector", "method": "full", "rank": 4},
        {"modules": "*norm*", "method": "milora", "rank": 4},
        "vision",
    ]
    found = "\n".join(faults(tiny_llava()[0], rules))
    for fault in (
        "policy[0].lr: unknown key",
        "policy[0].rank: expected a positive integer",
        "policy[5]: a rule is a mapping",
    ):
        assert fault in found, fault
    found = "\n".join(faults(tiny_llava()[0], rules[1:5]))
    for fault in (
        'policy[0].modules: no module matches "langauge.mlp"',
        "did you mean  language.mlp",
        "policy[1].rank: 65 is larger than min(out, in)",
        "policy[2].rank: method full cannot use it",
        'policy[3].modules: no module matches "*norm*"',
        "which adapters do not support",
    ):
        assert fault in found, fault
