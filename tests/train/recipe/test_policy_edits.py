"""--method, --rank, --alpha, --dropout and the learning rates replace a field of the adapter rules, nothing else."""

from __future__ import annotations

import pytest

from milora_vl.train.join_settings import edited
from milora_vl.train.settings import PolicyEdits
from support.problems import raises_code

PROJECTOR = {"modules": "projector", "method": "full", "learning_rate": 2e-5}
RULES = [
    {"modules": "language", "method": "milora", "rank": 128, "alpha": 128, "dropout": 0.05, "learning_rate": 2e-4},
    {"modules": "language.layers[0-3].mlp", "rank": 64},
    PROJECTOR,
]


@pytest.mark.parametrize("method", ["milora", "lora", "pissa", "random"])
def test_a_method_replaces_the_adapters_method(method: str) -> None:
    out = edited(RULES, PolicyEdits(method=method))
    assert out[0] == RULES[0] | {"method": method}
    assert out[1:] == RULES[1:]


def test_method_milora_is_the_papers_whatever_the_recipe_says() -> None:
    own = [RULES[0] | {"method": "milora", "alpha": 256, "rslora": True, "protect": 0.5}]
    (rule,) = edited(own, PolicyEdits(method="milora"))
    assert rule == RULES[0] | {"method": "milora", "alpha": RULES[0]["rank"]}


def test_another_method_drops_what_only_the_old_one_has() -> None:
    drawn = [RULES[0] | {"method": "random", "seed": 3}]
    assert edited(drawn, PolicyEdits(method="random")) == drawn
    assert edited(drawn, PolicyEdits(method="milora")) == [RULES[0] | {"method": "milora"}]
    assert "seed" not in edited(drawn, PolicyEdits(method="full"))[0]
    refined = [*drawn, {"modules": "language.mlp", "seed": 5}]
    assert edited(refined, PolicyEdits(method="milora")) == [RULES[0] | {"method": "milora"}]
    refined = [RULES[0], {"modules": "language.mlp", "rank": 8, "protect": 0.5}]
    assert edited(refined, PolicyEdits(method="lora"))[1] == {"modules": "language.mlp", "rank": 8}


def test_full_keeps_the_learning_rate_and_drops_what_only_adapters_have() -> None:
    out = edited(RULES, PolicyEdits(method="full"))
    assert out == [{"modules": "language", "method": "full", "learning_rate": 2e-4}, PROJECTOR]


def test_full_of_the_default_policy_has_the_rate_of_full_modules() -> None:
    assert edited(None, PolicyEdits(method="full")) == [
        {"modules": "language", "method": "full"}, {"modules": "projector", "method": "full"},
    ]  # fmt: skip
    assert edited(None, PolicyEdits(method="full", learning_rate=1e-5))[0]["learning_rate"] == 1e-5


def test_one_tower_alone_keeps_its_rules() -> None:
    assert edited(RULES, PolicyEdits(train="projector")) == [PROJECTOR]
    assert edited(None, PolicyEdits(train="projector", method="full")) == [{"modules": "projector", "method": "full"}]
    assert [rule["modules"] for rule in edited(None, PolicyEdits(train="language"))] == ["language"]


def test_a_new_rank_keeps_the_scale_unless_alpha_is_given() -> None:
    rules = [RULES[0] | {"alpha": 256}, *RULES[1:]]
    assert [r.get("alpha") for r in edited(rules, PolicyEdits(rank=8))] == [16, None, None]
    assert edited(rules, PolicyEdits(rank=8, alpha=4))[0]["alpha"] == 4
    assert edited(rules, PolicyEdits(rank=8))[1]["rank"] == 8


@pytest.mark.parametrize(
    ("rules", "edits", "code", "message"),
    [
        (RULES, PolicyEdits(method="full", rank=8), "flag-no-effect", "--rank: no effect with --method full"),
        ([PROJECTOR], PolicyEdits(method="milora"), "policy-no-adapter-rule", "no rule makes an adapter"),
        ([PROJECTOR], PolicyEdits(alpha=1), "policy-no-adapter-rule", "--alpha: no rule"),
        ([PROJECTOR], PolicyEdits(train="language"), "flag-no-effect", "no rule of the policy trains the language"),
        (
            RULES[:1],
            PolicyEdits(mm_projector_lr=1e-4),
            "flag-no-effect",
            "no rule of the policy trains the projector",
        ),
    ],
)
def test_a_flag_without_use_is_an_error(rules: list, edits: PolicyEdits, code: str, message: str) -> None:
    with raises_code(code, says=message):
        edited(rules, edits)


def test_protect_sets_the_share_of_every_adapter_rule_and_ends_with_zero() -> None:
    assert edited(None, PolicyEdits(protect=0.9))[0]["protect"] == 0.9
    assert edited(None, PolicyEdits(protect=0.0))[0]["protect"] == 0, "the default of milora is another one"
    lora = {"modules": "language", "method": "lora", "rank": 4, "protect": 0.5}
    assert "protect" not in edited([lora], PolicyEdits(protect=0.0))[0]
    own = [RULES[0] | {"protect": 0.5}, {"modules": "language.mlp", "protect": 0.7}, PROJECTOR]
    out = edited(own, PolicyEdits(protect=0.9))
    assert out == [RULES[0] | {"protect": 0.9}, PROJECTOR], "a refinement that set protect alone is gone"
    own[1]["protect"] = 0
    assert edited(own, PolicyEdits(protect=0.9))[1] == own[1], "an exception stays one"


@pytest.mark.parametrize("method", ["milora", "pissa", "lora"])
def test_a_method_drops_the_share_of_the_recipe_unless_the_flag_sets_one(method: str) -> None:
    own = [RULES[0] | {"protect": 0.5}, {"modules": "language.mlp", "protect": 0}, PROJECTOR]
    assert edited(own, PolicyEdits(method=method)) == [RULES[0] | {"method": method}, PROJECTOR]
    assert edited(own, PolicyEdits(method=method, protect=0.9))[0]["protect"] == 0.9
