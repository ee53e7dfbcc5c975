from __future__ import annotations

import torch
from torch import Tensor, nn

from milora_vl.core.adapter.apply import apply_milora
from support.adapter_cases import LLAVA_POLICY, one_rule, tiny_gpt2
from support.problems import raises_code


def test_full_paths_are_adapted_and_nothing_of_the_vision_tower(tiny_llava) -> None:
    model = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    config = model.peft_config["default"]
    assert len(config.target_modules) == 14
    assert all(path.startswith("model.language_model.layers.") for path in config.target_modules)
    assert not [
        name for name, p in model.named_parameters() if "vision" in name and (p.requires_grad or "lora" in name)
    ]


def test_rank_and_alpha_are_doubled_where_there_is_an_anchor(tiny_llava) -> None:
    model = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    layers = model.base_model.model.model.language_model.layers
    assert (layers[0].mlp.up_proj.r["default"], layers[0].mlp.up_proj.scaling["default"]) == (6, 2)
    assert (layers[1].mlp.up_proj.r["default"], layers[1].mlp.up_proj.scaling["default"]) == (10, 2)
    assert (layers[0].self_attn.q_proj.r["default"], layers[0].self_attn.q_proj.scaling["default"]) == (4, 2)


def test_the_peft_class_follows_the_model(tiny_llama) -> None:
    assert type(apply_milora(tiny_llama()[0], one_rule())).__name__ == "MiloraModelForCausalLM"
    assert type(apply_milora(nn.Sequential(nn.Linear(4, 4)), one_rule())).__name__ == "MiloraModel"


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
    with raises_code("adapter-ambiguous-names", "inner.fc"):
        apply_milora(Endings(), rules)


def test_layers_of_both_kinds_in_one_policy() -> None:
    """GPT-2 keeps its weights transposed, its head does not."""
    rules = [*one_rule(), {"modules": "lm_head", "method": "milora", "protect": 0, "rank": 2}]
    base, model = tiny_gpt2(), apply_milora(tiny_gpt2(), rules)
    ids = torch.arange(6)[None]
    assert torch.equal(base(ids).logits, model(ids).logits)
