"""Policies and rules as people write them: YAML, lists, and every mistake with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from milora_vl import apply_milora
from milora_vl.common.errors import Problem
from milora_vl.core.policy import FloorSigma, Policy, PolicyError, Rule
from milora_vl.core.policy.rules import METHODS
from support.adapter_cases import one_rule
from support.problems import raises_code, raises_problem

YAML = """
- {modules: language, method: milora, protect: 0, rank: 128, alpha: 128, dropout: 0.05, learning_rate: 2.0e-4}
- {modules: "language.layers[0-3].mlp", rank: 64, sigma: {floor: 0.1}}
- {modules: projector, method: full}
"""


def test_yaml_and_plain_data_give_the_same_policy() -> None:
    policy = Policy.parse(YAML)
    assert policy.rules[1] == Rule(modules="language.layers[0-3].mlp", rank=64, sigma=FloorSigma(floor=0.1))
    assert Policy.parse(policy.to_list()) == policy
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


def test_a_later_rule_ends_the_protection_and_sigma_does_not_go_with_it(tiny_llama) -> None:
    rules = [*one_rule(protect=0.9), {"modules": "language.mlp", "protect": 0}]
    targets = Policy.parse(rules).resolve(tiny_llama()[0])
    assert {target.protect for target in targets if ".mlp." in target.path} == {0}
    assert {target.has_anchor for target in targets if ".mlp." in target.path} == {True}
    assert {target.has_fixed_A for target in targets if ".mlp." not in target.path} == {True}
    with raises_problem(where="policy[0].sigma"):
        Policy.parse(one_rule(protect=0.9, sigma="none")).resolve(tiny_llama()[0])


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
        ({"sigma": "drop"}, "policy-value", r"sigma: expected keep, none or \{floor"),
        ({"sigma": {"floor": 0.0}}, "policy-value", r"sigma\.floor: expected a share of the median, up to 1, got 0\.0"),
        ({"seed": -1}, "policy-value", r"seed: expected an integer from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32}, "policy-value", r"seed"),
        ({"seed": False}, "policy-value", r"seed"),
    ],
)
def test_faults_of_a_rule_say_field_expected_and_got(fields, code: str, message: str) -> None:
    with raises_code(code, says=message, kind=PolicyError):
        Rule(**{"modules": "language", **fields})
