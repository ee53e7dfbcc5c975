"""The field `protect` of a rule: read, written, and refused where it makes no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from milora_vl import apply_milora
from milora_vl.policy import Policy, PolicyError
from milora_vl.policy.rules import Protect
from support.adapter_cases import one_rule
from support.problems import raises_code


def test_a_policy_with_it_is_read_and_written() -> None:
    policy = Policy.parse("[{modules: language, method: lora, rank: 2, protect: {top: 3, by: penalty, weight: 50}}]")
    assert policy.rules[0].protect == Protect(top=3, by="penalty", weight=50)
    assert Policy.parse(policy.to_list()) == policy
    assert Policy.parse(one_rule(protect={"top": 3})).to_list()[0]["protect"] == {"top": 3}


@pytest.mark.parametrize(
    ("protect", "code", "where", "says"),
    [
        (3, "policy-protect", "", r"\{inputs: 0.9\} or \{top: 64\}"),
        ({"by": "basis"}, "policy-protect", "", "neither"),
        ({"top": 3, "inputs": 0.5}, "policy-protect", "", "both"),
        ({"top": 3, "max": 5}, "policy-protect", ".max", "only inputs"),
        ({"inputs": 0.5, "by": "basis"}, "policy-protect", ".by", "projection only, got basis"),
        ({"inputs": 0.0}, "policy-protect", ".inputs", "got 0.0"),
        ({"inputs": 1}, "policy-protect", ".inputs", "got 1"),
        ({"inputs": 0.5, "max": 0}, "policy-protect", ".max", "got 0"),
        ({"top": 0}, "policy-protect", ".top", "got 0"),
        ({"top": 3, "by": "prayer"}, "policy-protect", ".by", "projection, basis, penalty, got 'prayer'"),
        ({"top": 3, "weight": 2.0}, "policy-protect", ".weight", "by: projection"),
        ({"top": 3, "by": "penalty"}, "policy-protect", ".weight", "got None"),
        ({"top": 3, "wieght": 2.0}, "policy-unknown-key", ".wieght", "did you mean weight"),
    ],
)
def test_what_is_no_protection_is_refused(protect: Any, code: str, where: str, says: str) -> None:
    with raises_code(code, where=f"policy[0].protect{where}", says=says, kind=PolicyError):
        Policy.parse(one_rule(protect=protect))


@pytest.mark.parametrize("method", ["pissa", "random", "middle", "dora", "olora", "mica", "full", "frozen"])
def test_methods_that_cannot_stay_outside_are_refused(tiny_llama, method: str) -> None:
    rule = {"modules": "language", "method": method, "protect": {"top": 3}}
    rule |= {} if method in ("full", "frozen") else {"rank": 2}
    with raises_code(
        "policy-unused-field", says=f"policy\\[0\\]\\.protect: method {method} cannot use it", kind=PolicyError
    ):
        apply_milora(tiny_llama()[0], [rule])


@pytest.mark.parametrize("method", ["dora", "olora", "mica", "full", "frozen"])
def test_methods_that_cannot_protect_inputs_are_refused(tiny_llama, method: str) -> None:
    rule = {"modules": "language", "method": method, "protect": {"inputs": 0.5}}
    rule |= {} if method in ("full", "frozen") else {"rank": 2}
    with raises_code(
        "policy-unused-field", says=f"policy\\[0\\]\\.protect: method {method} cannot use it", kind=PolicyError
    ):
        apply_milora(tiny_llama()[0], [rule])


def test_a_later_method_drops_what_it_cannot_protect() -> None:
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(10, 12))
    for protect, kept in (({"top": 3}, None), ({"inputs": 0.5}, Protect(inputs=0.5))):
        rules = [*one_rule(protect=protect), {"modules": "0", "method": "pissa"}]
        assert Policy.parse(rules).resolve(bare)[0].protect == kept


def test_more_directions_than_a_matrix_has_are_refused(tiny_llama) -> None:
    with raises_code(
        "policy-protect",
        where="protect",
        message="top 20 and rank 13 are more directions than the 32 of shape",
        kind=PolicyError,
    ):
        apply_milora(tiny_llama()[0], one_rule(rank=13, protect={"top": 20}))
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(10, 12))
    rules = one_rule(rank={"energy": 0.01}, protect={"top": 4})
    assert Policy.parse(rules).resolve(bare)[0].rank == 6  # an upper bound, without weights
