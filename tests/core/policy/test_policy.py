"""Policies and rules as people write them: YAML, lists, every mistake with its place; and the targets they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milora_vl import apply_milora, load_adapter, save_adapter
from milora_vl.common.errors import Problem
from milora_vl.core.policy import Policy, PolicyError, Rule, Target
from milora_vl.core.policy.rules import METHODS
from support.adapter_cases import LLAVA_POLICY, one_rule, token_batch, train_steps
from support.problems import raises_code, raises_problem

YAML = """
- {modules: language, method: milora, protect: 0, rank: 128, alpha: 128, dropout: 0.05, learning_rate: 2.0e-4}
- {modules: "language.layers[0-3].mlp", rank: 64, rslora: true}
- {modules: projector, method: full}
"""


def test_yaml_and_plain_data_give_the_same_policy() -> None:
    policy = Policy.parse(YAML)
    assert policy.rules[1] == Rule(modules="language.layers[0-3].mlp", rank=64, rslora=True)
    assert Policy.parse([rule.model_dump(exclude_defaults=True) for rule in policy.rules]) == policy
    assert Policy.parse(policy) is policy
    assert Policy.parse(list(policy.rules)) == policy


def test_a_policy_is_read_from_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(YAML)
    assert Policy.parse(file) == Policy.parse(str(file)) == Policy.parse(YAML)
    model = apply_milora(nn.Sequential(nn.Linear(4, 4)), _written(tmp_path / "small.yml", one_rule(rank=2)))
    assert model.milora_targets[0].rank == 2
    with raises_code("file-unreadable", where="none.yaml"):
        Policy.parse("none.yaml")


def _written(file: Path, rules: list[dict[str, Any]]) -> str:
    file.write_text(json.dumps(rules))
    return str(file)


def problems(source) -> list[Problem]:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(source)
    return list(caught.value.problems)


def test_all_problems_come_together_with_their_dotted_place() -> None:
    found = problems([{"modules": "language", "methods": "milora"}, {"method": "lora", "rank": -1}, "language"])
    assert [(str(problem.where), problem.code) for problem in found] == [
        ("policy[0].methods", "policy-unknown-key"),
        ("policy[1].modules", "policy-value"),
        ("policy[1].rank", "policy-value"),
        ("policy[2]", "policy-value"),
    ]
    assert found[0].hint == "did you mean method?"


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("modules: language", "policy-value", "expected a list of rules, got dict"),
        ("[", "yaml-syntax", "not valid YAML"),
        ("[" * 3000, "yaml-syntax", "not valid YAML"),
        ("language", "policy-value", "expected a list of rules, got str"),
        ([], "policy-value", "expected a list of rules, got an empty list"),
        (
            [{"modules": "language", "rank": {"energy": 0.5}}],
            "policy-value",
            r"policy\[0\].rank: expected a positive integer, got {'energy': 0.5}",
        ),
        (
            [{"modules": "language", "rnk": "milora"}],
            "policy-unknown-key",
            r"policy\[0\].rnk: unknown key\ndid you mean",
        ),
        ([{"modules": "language", "lr": 1}], "policy-unknown-key", "unknown key\nknown keys: modules, method"),
    ],
)
def test_what_is_no_policy_is_refused(source, code: str, message: str) -> None:
    with raises_code(code, says=message, kind=PolicyError):
        Policy.parse(source)


@pytest.mark.parametrize("protect", [1, -0.1, "much", {"inputs": 0.9}])
def test_what_is_no_protection_is_refused(protect) -> None:
    with raises_problem(where="policy[0].protect", says="a share from 0, below 1", kind=PolicyError):
        Policy.parse(one_rule(protect=protect))


def test_a_later_rule_ends_the_protection(tiny_llama) -> None:
    rules = [*one_rule(protect=0.9), {"modules": "language.mlp", "protect": 0}]
    targets = Policy.parse(rules).resolve(tiny_llama()[0])
    assert {target.protect for target in targets if ".mlp." in target.path} == {0}
    assert {target.has_anchor for target in targets if ".mlp." in target.path} == {True}
    assert {target.has_fixed_A for target in targets if ".mlp." not in target.path} == {True}


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"modules": ""}, "policy-value", r"modules: expected a tower"),
        ({"method": "milor"}, "policy-value", rf"method: expected one of {', '.join(METHODS)}, got 'milor'"),
        ({"rslora": "yes"}, "policy-value", r"rslora: expected true or false, got 'yes'"),
        ({"rank": 0}, "policy-value", r"rank: expected a positive integer"),
        ({"rank": 2.5}, "policy-value", r"got 2.5"),
        ({"rank": True}, "policy-value", r"got True"),
        ({"rank": "8"}, "policy-value", r"got '8'"),
        ({"rank": {"energy": 0.1}}, "policy-value", r"rank: expected a positive integer"),
        ({"alpha": 0}, "policy-value", r"alpha: expected a number above 0, got 0"),
        ({"alpha": float("nan")}, "policy-value", r"alpha: expected a number above 0, got nan"),
        ({"learning_rate": float("inf")}, "policy-value", r"learning_rate: expected a number above 0, got inf"),
        ({"dropout": float("nan")}, "policy-value", "got nan"),
        ({"dropout": 1}, "policy-value", r"dropout: expected a number from 0, below 1, got 1"),
        ({"dropout": -0.1}, "policy-value", r"got -0.1"),
        ({"learning_rate": "2e-4"}, "policy-value", r"above 0, got '2e-4'(.|\n)*without quotes it is a number:  2e-4"),
        ({"weight_decay": -1}, "policy-value", r"weight_decay: expected a number from 0, got -1"),
        ({"seed": -1}, "policy-value", r"seed: expected an integer from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32}, "policy-value", r"seed"),
        ({"seed": False}, "policy-value", r"seed"),
    ],
)
def test_faults_of_a_rule_say_field_expected_and_got(fields, code: str, message: str) -> None:
    with raises_code(code, says=message, kind=PolicyError):
        Rule(**{"modules": "language", **fields})


LM = "model.language_model.layers"


def resolved(model: nn.Module, rules) -> dict[str, Target]:
    return {target.path: target for target in Policy.parse(rules).resolve(model)}


def faults(model: nn.Module, rules) -> str:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(rules).resolve(model)
    return str(caught.value)


def test_later_rules_override_the_fields_they_name(tiny_llava) -> None:
    targets = resolved(tiny_llava()[0], LLAVA_POLICY)
    q = targets[f"{LM}.1.self_attn.q_proj"]
    assert (q.shape, q.tower, q.method, q.rank, q.alpha) == ((64, 64), "language", "milora", 3, 6)
    assert (q.dropout, q.learning_rate) == (0.05, 2e-4)
    mlp = targets[f"{LM}.1.mlp.up_proj"]
    assert (mlp.rank, mlp.alpha, mlp.scaling, mlp.dropout) == (5, 10, 2, 0.05)  # the scale alpha/rank stays
    assert targets[f"{LM}.0.self_attn.q_proj"].method == "lora"
    projector = targets["model.multi_modal_projector.linear_1"]
    assert (projector.method, projector.rank, projector.learning_rate) == ("full", None, 2e-5)
    assert {t.tower for t in targets.values()} == {"language", "projector"}


def test_alpha_is_the_rank_unless_set(tiny_llama) -> None:
    model, _ = tiny_llama()
    first = f"{LM}.0".replace("language_model.", "") + ".mlp.up_proj"
    assert resolved(model, [{"modules": "language", "method": "milora", "protect": 0, "rank": 4}])[first].alpha == 4
    rules = [{"modules": "language", "method": "milora", "protect": 0, "rank": 4, "alpha": 4}]
    assert resolved(model, [*rules, {"modules": "language", "rank": 8, "alpha": 4}])[first].alpha == 4
    assert resolved(model, [*rules, {"modules": "language", "rank": 8}])[first].alpha == 8
    assert resolved(model, [*rules, {"modules": "language", "alpha": 8}])[first].scaling == 2


def test_alpha_and_rank_of_two_rules_scale_as_in_one(tiny_llama) -> None:
    base = {"modules": "language", "method": "milora", "protect": 0, "rank": 4}
    alpha, rank = {"modules": "language", "alpha": 16}, {"modules": "language", "rank": 8}
    orders = [[{**base, **alpha, **rank}], [base, alpha, rank], [base, rank, alpha]]
    scales = {target.scaling for rules in orders for target in resolved(tiny_llama()[0], rules).values()}
    assert scales == {2.0}


def test_a_later_rank_keeps_the_scale_of_rslora(tiny_llama) -> None:
    rules = [
        {"modules": "language", "method": "milora", "protect": 0, "rank": 4, "alpha": 4, "rslora": True},
        {"modules": "language.mlp", "rank": 16},
    ]
    targets = resolved(tiny_llama()[0], rules)
    mlp, attention = targets["model.layers.0.mlp.up_proj"], targets["model.layers.0.self_attn.q_proj"]
    assert (attention.alpha, mlp.rank, mlp.alpha) == (4, 16, 8)  # 4 / sqrt(4) = 8 / sqrt(16)


class Gated(nn.Module):
    """A layer with its own weight beside the layer that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Parameter(torch.ones(3)), nn.Linear(4, 3)


def test_a_module_that_trains_in_full_takes_along_what_it_holds() -> None:
    model = nn.ModuleDict({"first": Gated(), "last": nn.Linear(3, 2)})
    rules = [{"modules": "*", "method": "milora", "protect": 0, "rank": 2}, {"modules": "first", "method": "full"}]
    assert {path: target.method for path, target in resolved(model, rules).items()} == {
        "first": "full",
        "last": "milora",
    }


def test_a_policy_that_ends_all_frozen_is_refused(tiny_llama) -> None:
    rules = [
        {"modules": "language", "method": "milora", "protect": 0, "rank": 2},
        {"modules": "language", "method": "frozen"},
    ]
    with raises_code("policy-nothing-trains", where="policy"):
        apply_milora(tiny_llama()[0], rules)


def test_frozen_rules_take_modules_out_again(tiny_llama) -> None:
    rules = [
        {"modules": "language", "method": "milora", "protect": 0, "rank": 4},
        {"modules": "language.layers[0]", "method": "frozen"},
    ]
    assert all(".layers.1." in path for path in resolved(tiny_llama()[0], rules))


def test_a_new_method_drops_what_it_cannot_use_of_earlier_rules(tiny_llama) -> None:
    rules = [
        {"modules": "language", "method": "random", "protect": 0, "rank": 4, "seed": 5, "learning_rate": 1e-3},
        {"modules": "language.mlp", "method": "full"},
        {"modules": "language.attention", "method": "lora"},
    ]
    targets = resolved(tiny_llama()[0], rules)
    mlp, attention = targets["model.layers.0.mlp.up_proj"], targets["model.layers.0.self_attn.q_proj"]
    assert (mlp.rank, mlp.learning_rate) == (None, 1e-3)
    assert (attention.rank, attention.seed) == (4, 0)


def test_norms_and_heads_train_in_full_where_a_rule_names_them(tiny_llama) -> None:
    rules = [
        {"modules": "*norm*", "method": "full"},
        {"modules": "lm_head", "method": "full"},
        {"modules": "*norm*", "learning_rate": 1e-5},
    ]
    targets = resolved(tiny_llama()[0], rules)
    assert len(targets) == 6
    assert targets["model.norm"].shape == (64,)
    assert targets["model.norm"].learning_rate == 1e-5


def test_all_faults_come_together(tiny_llava) -> None:
    rules = [
        {"modules": "langauge", "method": "milora", "protect": 0, "rank": 4},
        {"modules": "language.mlp", "method": "milora", "protect": 0, "rank": 65},
        {"modules": "language.attention", "method": "milora", "protect": 0},
        {"modules": "projector", "method": "full", "rank": 4, "dropout": 0.1},
        {"modules": "vision", "learning_rate": 1e-4},
    ]
    lines = faults(tiny_llava()[0], rules)
    assert 'policy[0].modules: no module matches "langauge"' in lines
    assert "policy[1].rank: 65 is larger than min(out, in) = 64 of shape (128, 64)" in lines
    assert "policy[2].rank: method milora needs a rank: model.language_model.layers.0.self_attn.q_proj" in lines
    assert "and 6 more" in lines
    assert "policy[3].rank: method full cannot use it" in lines
    assert "policy[3].dropout: method full cannot use it" in lines
    assert 'policy[4]: no rule gives a method to "vision"' in lines


def test_a_rank_too_large_for_several_shapes_is_one_problem_with_the_largest_rank_that_fits(tiny_llava) -> None:
    rule = {
        "modules": "language",
        "method": "milora",
        "protect": 0,
        "rank": 65,
    }  # shapes (64, 64), (32, 64), (128, 64), (64, 128)
    with raises_code("policy-rank-too-large", message="min(out, in) = 32", hint="a rank of at most 32") as error:
        Policy.parse([rule]).resolve(tiny_llava()[0])
    assert len(error.value.problems) == 1
    assert resolved(tiny_llava()[0], [rule | {"rank": 32}])


def test_a_weight_shared_with_another_module_is_refused(tiny_llama) -> None:
    model, _ = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    for method in ({"method": "milora", "protect": 0, "rank": 4}, {"method": "full"}):
        text = faults(model, [{"modules": "lm_head", **method}])
        assert "lm_head: shares its weight with model.embed_tokens" in text
    whole = {"modules": "language.*", "method": "full"}
    assert {"lm_head", "model.embed_tokens"} <= resolved(model, [whole]).keys()
    adapted = {"modules": "language", "method": "milora", "protect": 0, "rank": 4}
    assert "shares its weight with" in faults(model, [whole, adapted])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "no adapter on a convolution in 2 groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), r"dilation \(2, 2\)"),
        (nn.Conv2d(4, 4, 3, padding_mode="circular"), "padding circular"),
    ],
)
def test_convolutions_that_peft_gets_wrong_are_refused_by_name(layer: nn.Module, message: str) -> None:
    with raises_code("policy-no-adapter", says=f"{message}.*: 0\n", kind=PolicyError):
        Policy.parse([{"modules": "0", "method": "milora", "protect": 0, "rank": 2}]).resolve(nn.Sequential(layer))


def test_only_plain_lora_may_have_a_rank_above_the_matrix() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    assert resolved(model, [{"modules": "language", "method": "lora", "rank": 8}])["0"].rank == 8
    assert "larger than min(out, in) = 3" in faults(model, [{"modules": "0", "method": "pissa", "rank": 8}])


Q = "model.layers.0.self_attn.q_proj"

IDS = token_batch(200)


def test_a_baseline_does_not_mix_and_an_embedding_has_no_minor_half(tiny_llama) -> None:
    rules = [*one_rule(method="dora"), {"modules": "language.mlp", "method": "milora", "protect": 0}]
    with raises_code("policy-mixed-baseline", where="policy", message="does not mix with milora"):
        resolved(tiny_llama()[0], rules)
    for method in ("milora", "pissa", "random"):
        rules = [{"modules": "*embed_tokens", "method": method, "rank": 2}]
        with raises_code("policy-no-adapter", message=f"an embedding with method {method}: use lora or full"):
            resolved(tiny_llama()[0], rules)


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
