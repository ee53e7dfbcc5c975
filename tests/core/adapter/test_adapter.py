"""`apply_milora` and `merge`: what PEFT gets, what they refuse, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from milora_vl import apply_milora, merge, save_adapter
from milora_vl.core.policy import PolicyError
from support.adapter_cases import LLAVA_POLICY, move, one_rule, tiny_gpt2, token_batch
from support.problems import raises_code, raises_problem


@pytest.mark.parametrize("modules", ["projector", "language"])
def test_a_policy_without_adapters_returns_the_model_itself(tiny_llava, modules: str) -> None:
    base, _ = tiny_llava()
    model = apply_milora(base, [{"modules": modules, "method": "full"}, {"modules": "vision", "method": "frozen"}])
    assert model is base
    assert model.milora_report == []
    trained = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {target.path for target in model.milora_targets}


def test_faults_leave_the_model_as_it_was(tiny_llama) -> None:
    model, _ = tiny_llama()
    with pytest.raises(PolicyError) as error:
        apply_milora(model, one_rule(rank=1000))
    assert {problem.code for problem in error.value.problems} == {"policy-rank-too-large"}
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with raises_problem(where="model.layers.1.mlp.up_proj", message="the weight contains 1 NaN", kind=ValueError):
        apply_milora(model, one_rule())
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_an_adapter_is_refused(tiny_llama) -> None:
    model = apply_milora(tiny_llama()[0], one_rule())
    for again in (model, model.get_base_model()):
        with raises_problem():
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
    with raises_problem("", "got Linear"):
        merge(nn.Linear(2, 2))
    model = apply_milora(nn.Sequential(nn.Linear(4, 4)), one_rule())
    with raises_problem("", "Sequential has no save_pretrained"):
        merge(model, "somewhere")
    assert model.peft_config
    merge(model)
    with raises_code("", message="no adapter any more"):
        save_adapter(model, "somewhere")


def test_rank_and_alpha_are_doubled_where_there_is_an_anchor(tiny_llava) -> None:
    model = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    layers = model.base_model.model.model.language_model.layers
    assert (layers[0].mlp.up_proj.r["default"], layers[0].mlp.up_proj.scaling["default"]) == (6, 2)
    assert (layers[1].mlp.up_proj.r["default"], layers[1].mlp.up_proj.scaling["default"]) == (10, 2)
    assert (layers[0].self_attn.q_proj.r["default"], layers[0].self_attn.q_proj.scaling["default"]) == (4, 2)


class Endings(nn.Module):
    """A module whose path is the end of another's, which PEFT's rule for lists would take too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.Sequential()
        self.inner.add_module("fc", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x))


def test_a_path_that_ends_another_is_adapted_alone(tmp_path) -> None:
    from peft import PeftModel

    model = apply_milora(Endings(), one_rule(modules="fc"))
    model.save_pretrained(tmp_path)
    for made in (model, PeftModel.from_pretrained(Endings(), tmp_path)):
        assert {name for name, _ in made.named_modules() if name.endswith(".lora_A")} == {"base_model.model.fc.lora_A"}


def test_a_full_module_that_peft_would_confuse_is_refused() -> None:
    rules = [{"modules": "fc", "method": "full"}, {"modules": "inner.fc", "method": "milora", "protect": 0, "rank": 2}]
    with raises_problem("inner.fc"):
        apply_milora(Endings(), rules)


def test_layers_of_both_kinds_in_one_policy() -> None:
    """GPT-2 keeps its weights transposed, its head does not."""
    rules = [*one_rule(), {"modules": "lm_head", "method": "milora", "protect": 0, "rank": 2}]
    base, model = tiny_gpt2(), apply_milora(tiny_gpt2(), rules)
    ids = torch.arange(6)[None]
    assert torch.equal(base(ids).logits, model(ids).logits)
