"""DoRA for a whole run; rsLoRA; budgets; and all faults of a policy in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from milora_vl import apply_milora, load_adapter, save_adapter
from milora_vl.core.policy import PolicyError
from support.adapter_cases import one_rule, token_batch, train_steps

Q = "model.layers.0.self_attn.q_proj"
IDS = token_batch(200)


def faults(model: nn.Module, rules) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        apply_milora(model, rules)
    return str(caught.value).splitlines()


def test_a_baseline_does_not_mix_and_an_embedding_has_no_minor_half(tiny_llama) -> None:
    rules = [*one_rule(method="dora"), {"modules": "language.mlp", "method": "milora", "protect": 0}]
    message = "policy: dora is a baseline for a whole run, it does not mix with milora"
    assert faults(tiny_llama()[0], rules) == [message, "use dora in all rules that have an adapter"]
    rules = [{"modules": "*embed_tokens", "method": "milora", "rank": 2}]
    assert "no adapter on an embedding with method milora" in faults(tiny_llama()[0], rules)[0]


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
        {"modules": "language", "method": "milora", "protect": 0, "rank": 0, "lr": 1e-4},
        {"modules": "langauge.mlp", "method": "milora", "protect": 0, "rank": 4},
        {"modules": "language.attention", "method": "milora", "protect": 0, "rank": 65},
        {"modules": "projector", "method": "full", "rank": 4},
        {"modules": "*norm*", "method": "milora", "protect": 0, "rank": 4},
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
