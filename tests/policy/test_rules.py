from __future__ import annotations

import pytest

from milora_vl.policy.methods import METHODS
from milora_vl.policy.rules import PolicyError, Rule, Target


def test_a_rule_names_only_the_fields_it_was_given() -> None:
    assert Rule(modules="language", method="lora", rank=4).named_fields() == {"method": "lora", "rank": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules": ""}, r"\.modules: expected a tower"),
        ({"method": "milor"}, rf"\.method: expected one of {', '.join(METHODS)}, got 'milor'"),
        ({"rslora": "yes"}, r"\.rslora: expected true or false, got 'yes'"),
        ({"rank": 0}, r"\.rank: expected a positive integer"),
        ({"rank": 2.5}, r"got 2.5"),
        ({"rank": True}, r"got True"),
        ({"rank": "8"}, r"got '8'"),
        ({"rank": {}}, r"\.rank: expected exactly one of energy, threshold and budget"),
        ({"rank": {"energy": 0.1, "threshold": 0.1}}, "exactly one"),
        ({"rank": {"energy": 1.5}}, r"\.rank\.energy: expected a share above 0, at most 1, got 1\.5"),
        ({"rank": {"energy": 0.1, "min": 4, "max": 2}}, "min <= max, got min 4, max 2"),
        ({"alpha": 0}, r"\.alpha: expected a number above 0, got 0"),
        ({"alpha": float("nan")}, r"\.alpha: expected a number above 0, got nan"),
        ({"learning_rate": float("inf")}, r"\.learning_rate: expected a number above 0, got inf"),
        ({"dropout": float("nan")}, "got nan"),
        ({"dropout": 1}, r"\.dropout: expected a number from 0, below 1, got 1"),
        ({"dropout": -0.1}, r"got -0.1"),
        ({"learning_rate": "2e-4"}, r"write 2\.0e-4"),
        ({"weight_decay": -1}, r"\.weight_decay: expected a number from 0, got -1"),
        ({"sigma": "drop"}, r"\.sigma: expected keep, none or \{floor"),
        ({"sigma": {"floor": 0.0}}, r"\.sigma\.floor: expected a share of the median, up to 1, got 0\.0"),
        ({"seed": -1}, r"\.seed: expected an integer from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32}, r"\.seed"),
        ({"seed": False}, r"\.seed"),
    ],
)
def test_faults_of_a_rule_say_field_expected_and_got(fields, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Rule(**{"modules": "language", **fields})


def test_all_faults_of_a_rule_come_together() -> None:
    with pytest.raises(PolicyError) as caught:
        Rule(modules="language", rank=0, alpha=-1, dropout=2)
    assert [problem.where for problem in caught.value.problems] == [".rank", ".alpha", ".dropout"]


def test_the_method_fixes_the_part() -> None:
    parts = {
        m: Target(path="a", shape=(2, 2), tower=None, method=m).part for m in ("milora", "pissa", "random", "lora")
    }
    assert parts == {"milora": "minor", "pissa": "principal", "random": "random", "lora": None}
