from __future__ import annotations

import pytest
import torch
from torch import nn

from milora_vl import apply_milora, merge, save_adapter
from milora_vl.core.policy import Policy, PolicyError
from support.adapter_cases import LLAVA_POLICY, llava_batch, move, one_rule, token_batch
from support.problems import raises_code


def test_the_result_reports_every_decomposed_weight_and_every_target(tiny_llava) -> None:
    model = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    assert len(model.milora_report) == 13
    assert len(model.milora_targets) == 16
    assert {r.path for r in model.milora_report} == {t.path for t in model.milora_targets if t.part}


def test_every_method_and_its_parameters(tiny_llava) -> None:
    rules = [
        {"modules": "language.layers[0].attention", "method": "milora", "protect": 0, "rank": 2},
        {"modules": "language.layers[0].mlp", "method": "pissa", "rank": 2},
        {"modules": "language.layers[1].attention", "method": "random", "rank": 2},
        {"modules": "language.layers[1].mlp", "method": "lora", "rank": 2},
        {"modules": "projector", "method": "full"},
        {"modules": "language.layers[1].mlp.down_proj", "method": "frozen"},
    ]
    base, _ = tiny_llava()
    model = apply_milora(tiny_llava()[0], rules)
    batch = llava_batch(base)
    assert torch.equal(base(**batch).logits, model(**batch).logits)
    kinds = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad and "lora" in name}
    assert kinds == {"delta", "weight"}
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "layers.1.mlp.down_proj" in n]
    projector = [n for n, p in model.named_parameters() if p.requires_grad and "multi_modal_projector" in n]
    assert len(projector) == 4
    assert all("modules_to_save" in name for name in projector)


def test_yaml_lists_and_policies_are_all_taken(tiny_llama) -> None:
    for policy in ("[{modules: language, method: milora, protect: 0, rank: 2}]", one_rule(), Policy.parse(one_rule())):
        assert len(apply_milora(tiny_llama()[0], policy).milora_targets) == 14


@pytest.mark.parametrize("modules", ["projector", "language"])
def test_a_policy_without_adapters_returns_the_model_itself(tiny_llava, modules: str) -> None:
    base, _ = tiny_llava()
    model = apply_milora(base, [{"modules": modules, "method": "full"}, {"modules": "vision", "method": "frozen"}])
    assert model is base
    assert model.milora_report == []
    trained = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {target.path for target in model.milora_targets}


def test_dropout_is_set_per_module(tiny_llava) -> None:
    rules = [*one_rule(dropout=0.3), {"modules": "language.mlp", "dropout": 0.0}]
    model = apply_milora(tiny_llava()[0], rules)
    layer = model.base_model.model.model.language_model.layers[0]
    assert layer.self_attn.q_proj.lora_dropout["default"].p == 0.3
    assert isinstance(layer.mlp.up_proj.lora_dropout["default"], nn.Identity)


def test_faults_leave_the_model_as_it_was(tiny_llama) -> None:
    model, _ = tiny_llama()
    with pytest.raises(PolicyError) as error:
        apply_milora(model, one_rule(rank=1000))
    assert {problem.code for problem in error.value.problems} == {"policy-rank-too-large"}
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with raises_code(
        "weight-decomposition", where="model.layers.1.mlp.up_proj", message="the weight contains 1 NaN", kind=ValueError
    ):
        apply_milora(model, one_rule())
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_an_adapter_is_refused(tiny_llama) -> None:
    model = apply_milora(tiny_llama()[0], one_rule())
    for again in (model, model.get_base_model()):
        with raises_code("adapter-already-present"):
            apply_milora(again, one_rule())


def test_merging_writes_a_model_that_gives_the_same_logits(tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = apply_milora(tiny_llama()[0], one_rule())
    move(model)
    ids = token_batch()
    expected = model(ids).logits
    merged = merge(model, tmp_path)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    for made in (merged, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.allclose(made(ids).logits, expected, atol=1e-5)


def test_merging_what_cannot_be_merged_is_refused_before_anything_happens() -> None:
    with raises_code("adapter-not-a-peft-model", "", "got Linear"):
        merge(nn.Linear(2, 2))
    model = apply_milora(nn.Sequential(nn.Linear(4, 4)), one_rule())
    with raises_code("adapter-cannot-save", "", "Sequential has no save_pretrained"):
        merge(model, "somewhere")
    assert model.peft_config
    merge(model)
    with raises_code("adapter-merged"):
        save_adapter(model, "somewhere")
