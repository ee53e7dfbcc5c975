"""Recipes: strict, every mistake at once with its place, and the same run when given back."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_vl.common.errors import UserError
from milora_vl.common.yaml_text import read_mapping
from milora_vl.train import settings as schema
from milora_vl.train.settings import Recipe


def problems(content: dict) -> str:
    with pytest.raises(UserError) as error:
        Recipe.parse(content, "my.yaml")
    return str(error.value)


def test_all_mistakes_are_named_at_once_with_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "modle: tiny\n"
        "data: {paht: a.json}\n"
        "policy:\n"
        "  - {modules: language, method: milora, protect: 0, rnak: 4}\n"
        "train: {lerning_rate: 1, bf16: maybe}\n"
    )
    with pytest.raises(UserError) as error:
        schema.load_recipe(path)
    found = {problem.where: problem for problem in error.value.problems}
    assert {where: problem.code for where, problem in found.items()} == {
        f"modle in {path}": "recipe-unknown-key",
        f"data.paht in {path}": "recipe-unknown-key",
        f"policy[0].rnak in {path}": "policy-unknown-key",
        f"train.lerning_rate in {path}": "recipe-unknown-key",
        f"train.bf16 in {path}": "recipe-value",
    }
    assert found[f"modle in {path}"].hint == "did you mean model?"


@pytest.mark.parametrize(
    ("section", "word"),
    [
        (
            {"path": [{"path": "a.json", "weight": -1}]},
            "data.path[0].weight in my.yaml: expected a number of at least 0",
        ),
        (
            {"path": [{"path": "a.json", "wieght": 1}]},
            "data.path[0].wieght in my.yaml: unknown key\ndid you mean weight?",
        ),
        ({"path": 3}, "expected a file or a list of {path, weight, image_folder}, got 3"),
        ({"max_length": 0}, "expected a number above 0, got 0"),
        ({"bad_images": "skp"}, "expected one of raise, skip, got 'skp'\ndid you mean skip?"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(section: dict, word: str) -> None:
    assert word in problems({"data": section})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"eval_strategy": False}, {"eval_strategy": "no"}),  # YAML reads a bare no as false
        ({"warmup_ratio": 0.03}, {"warmup_steps": 0.03}),
        ({"gradient_checkpointing": True}, {"activation_checkpointing": True}),
    ],
)
def test_old_names_become_the_new_ones(old: dict, new: dict) -> None:
    train = Recipe.parse({"train": old}).train
    assert train == schema.TRAIN_DEFAULTS | new


def test_contradictions_are_named() -> None:
    text = problems({"train": {"eval_strategy": "steps", "evaluation_strategy": "epoch"}})
    assert "contradicts" in text


def test_a_recipe_given_back_is_the_same_recipe() -> None:
    recipe = Recipe.parse(
        {
            "model": "tiny",
            "data": {"path": "a.json", "bad_images": "skip"},
            "policy": [{"modules": "language", "method": "milora", "protect": 0, "rank": 4, "rslora": True}],
            "train": {"learning_rate": 2e-5, "warmup_ratio": 0.03, "eval_strategy": "no", "report_to": "none"},
            "eval": {"suites": ["quick"], "limit": 10},
        }
    )
    assert Recipe.parse(read_mapping(recipe.to_yaml(), "again")) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\n", "my.yaml: not valid YAML: "),
        ("a: 1\nb: !include other.yaml\n", "could not determine a constructor for the tag '!include' (line 2)"),
        ("{[a]: b}", "found unhashable key"),
        ('a: "\x07"', "my.yaml: not valid YAML: unacceptable character"),
        ("a: 1\na: 2\n", "duplicate key a"),
        ("- 1\n", "my.yaml: expected a mapping"),
    ],
)
def test_broken_yaml_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_mapping(text, "my.yaml")
    assert message in str(error.value)
