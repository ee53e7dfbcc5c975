from __future__ import annotations

import pytest

from milora_vl.policy.policy import FloorSigma, Policy, PolicyError, Rule, SpectralRank

YAML = """
- {modules: language, method: milora, rank: 128, alpha: 128, dropout: 0.05, learning_rate: 2.0e-4}
- {modules: "language.layers[0-3].mlp", rank: {energy: 0.01, max: 64}, sigma: {floor: 0.1}}
- {modules: projector, method: full}
"""


def test_yaml_and_plain_data_give_the_same_policy() -> None:
    policy = Policy.parse(YAML)
    assert policy.rules[1] == Rule(
        modules="language.layers[0-3].mlp", rank=SpectralRank(energy=0.01, max=64), sigma=FloorSigma(0.1)
    )
    assert Policy.parse(policy.to_list()) == policy
    assert Policy.parse(policy) is policy
    assert Policy.parse(list(policy.rules)) == policy


def faults(source) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(source)
    return str(caught.value).splitlines()


def test_all_faults_come_together_with_their_dotted_place() -> None:
    found = faults([{"modules": "language", "methods": "milora"}, {"method": "lora", "rank": -1}, "language"])
    assert found[0] == "policy[0].methods: unknown key, did you mean 'method'?"
    assert found[1] == "policy[1].modules: missing"
    assert found[2].startswith("policy[1].rank: expected a positive integer")
    assert found[3].startswith("policy[2]: a rule is a mapping")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("modules: language", "expected a list of rules, got dict"),
        ("[", "not valid YAML"),
        ("language", "expected a list of rules, got str"),
        ([], "no rules, so nothing would train"),
        (
            [{"modules": "language", "rank": {"budget": 0.5}}],
            r"policy\[0\].rank.budget: expected a number of parameters, got 0.5",
        ),
        (
            [{"modules": "language", "rank": {"energie": 0.1}}],
            r"policy\[0\].rank.energie: unknown key, did you",
        ),
        ([{"modules": "language", "lr": 1}], "unknown key, known are modules, method"),
    ],
)
def test_what_is_no_policy_is_refused(source, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy.parse(source)
