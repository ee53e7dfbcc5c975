from __future__ import annotations

import pytest

from milora_vl.core.policy.rules import METHODS, PolicyError, Rule
from support.problems import raises_code


def test_a_rule_names_only_the_fields_it_was_given() -> None:
    assert Rule(modules="language", method="lora", rank=4).named_fields() == {"method": "lora", "rank": 4}


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"modules": ""}, "policy-value", r"modules: expected a tower"),
        ({"method": "milor"}, "policy-value", rf"method: expected one of {', '.join(METHODS)}, got 'milor'"),
        ({"rslora": "yes"}, "policy-value", r"rslora: expected true or false, got 'yes'"),
        ({"rank": 0}, "policy-rank", r"rank: expected a positive integer"),
        ({"rank": 2.5}, "policy-rank", r"got 2.5"),
        ({"rank": True}, "policy-rank", r"got True"),
        ({"rank": "8"}, "policy-rank", r"got '8'"),
        ({"rank": {"energy": 0.1}}, "policy-rank", r"rank: expected a positive integer"),
        ({"alpha": 0}, "policy-value", r"alpha: expected a number above 0, got 0"),
        ({"alpha": float("nan")}, "policy-value", r"alpha: expected a number above 0, got nan"),
        ({"learning_rate": float("inf")}, "policy-value", r"learning_rate: expected a number above 0, got inf"),
        ({"dropout": float("nan")}, "policy-value", "got nan"),
        ({"dropout": 1}, "policy-value", r"dropout: expected a number from 0, below 1, got 1"),
        ({"dropout": -0.1}, "policy-value", r"got -0.1"),
        ({"learning_rate": "2e-4"}, "policy-value", r"above 0, got '2e-4'(.|\n)*without quotes it is a number:  2e-4"),
        ({"weight_decay": -1}, "policy-value", r"weight_decay: expected a number from 0, got -1"),
        ({"sigma": "drop"}, "policy-value", r"sigma: expected keep, none or \{floor"),
        (
            {"sigma": {"floor": 0.0}},
            "policy-value",
            r"sigma\.floor: expected a share of the median, up to 1, got 0\.0",
        ),
        ({"seed": -1}, "policy-value", r"seed: expected an integer from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32}, "policy-value", r"seed"),
        ({"seed": False}, "policy-value", r"seed"),
    ],
)
def test_faults_of_a_rule_say_field_expected_and_got(fields, code: str, message: str) -> None:
    with raises_code(code, says=message, kind=PolicyError):
        Rule(**{"modules": "language", **fields})
