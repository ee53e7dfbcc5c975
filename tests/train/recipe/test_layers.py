"""Layers of settings: later ones win, and a value keeps the place where the user set it."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_vl.common.errors import Key, UserError
from milora_vl.train.recipe.layers import Section, merged, place_of, placed, plain
from support.plans import fitted


def at(name: str) -> Section:
    return placed({"data": {"limit": 1, "path": name}, "policy": [{"rank": 4}]}, lambda key: f"{name}:{key}")


def test_the_last_layer_wins_key_by_key_with_its_place() -> None:
    content = merged(at("a"), {"data": {"limit": 2}}, placed({"data": {"limit": 3}}, lambda key: "--limit"))
    assert plain(content) == {"data": {"limit": 3, "path": "a"}, "policy": [{"rank": 4}]}
    assert place_of(content, Key.of("data.limit")) == "--limit"
    assert place_of(content, Key.of("data.path")) == "a:data.path"


def test_a_missing_key_of_an_item_is_at_the_item_and_one_of_a_section_is_nowhere() -> None:
    content = at("a")
    assert place_of(content, Key(("policy", 0, "rank"))) == "a:policy[0].rank"
    assert place_of(content, Key(("policy", 0, "alpha"))) == place_of(content, Key(("policy", 0))) == "a:policy[0]"
    assert place_of(content, Key.of("data.eval_path")) == place_of(content, Key.of("train.seed.x")) == ""


def test_rules_keep_their_lines_in_a_policy_file_and_when_flags_drop_others(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "- {modules: language, method: milora, protect: 0, rank: 4}\n- modules: projector.linear_9\n  method: full\n"
        "- {modules: language.mlp, method: milora, protect: 0}\n"
    )
    with pytest.raises(UserError) as caught:
        fitted(f"--model tiny --policy {file}")
    assert [str(problem.where) for problem in caught.value.problems] == [f"{file}:2: policy[1].modules"]
    with pytest.raises(UserError) as caught:
        fitted(f"--model tiny --policy {file} --method projector")
    assert [str(problem.where) for problem in caught.value.problems] == [f"{file}:2: policy[0].modules"]
