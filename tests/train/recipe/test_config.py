"""Recipes: strict, every mistake at once with its place, and the same run when given back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from milora_vl.common.errors import UserError
from milora_vl.common.yaml_text import read_mapping
from milora_vl.train import recipe as schema
from milora_vl.train.recipe import Recipe
from support.problems import raises_code


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
        schema.load(path)
    found = {problem.where: problem for problem in error.value.problems}
    assert {where: problem.code for where, problem in found.items()} == {
        f"modle in {path}": "recipe-unknown-key",
        f"data.paht in {path}": "recipe-unknown-key",
        f"policy[0].rnak in {path}": "policy-unknown-key",
        f"train.lerning_rate in {path}": "recipe-unknown-key",
        f"train.bf16 in {path}": "recipe-value",
    }
    assert found[f"modle in {path}"].hint == "did you mean model?"


def test_keys_that_are_removed_are_refused_by_name() -> None:
    removed = {
        "form": "residual",
        "keep": {"weight": 1.0},
        "data": {"feature_cache": "folder", "jpeg_decoding": "fast"},
        "policy": [
            {"modules": "language", "method": "milora", "protect": 0, "rank": {"spectrum": 0.1}, "form": "residual"}
        ],
    }
    with pytest.raises(UserError) as error:
        Recipe.parse(removed)
    assert {str(problem.where): problem.code for problem in error.value.problems} == {
        "form": "recipe-unknown-key",
        "keep": "recipe-unknown-key",
        "data.feature_cache": "recipe-unknown-key",
        "data.jpeg_decoding": "recipe-unknown-key",
        "policy[0].rank": "policy-value",
        "policy[0].form": "policy-unknown-key",
    }


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
        ({"bad_images": "skp"}, "expected one of raise, skip, replace, got 'skp'\ndid you mean skip?"),
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
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"gradient_checkpointing": True}, {"activation_checkpointing": True}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"save_safetensors": True, "overwrite_output_dir": False}, {}),
    ],
)
def test_old_names_become_the_new_ones(old: dict, new: dict) -> None:
    train = Recipe.parse({"train": old}).train
    assert train == schema.TRAIN_DEFAULTS | new


def test_overwriting_is_refused_and_contradictions_are_named() -> None:
    assert "a run never overwrites files" in problems({"train": {"overwrite_output_dir": True}})
    text = problems({"train": {"eval_strategy": "steps", "evaluation_strategy": "epoch"}})
    assert "contradicts" in text


def test_a_recipe_given_back_is_the_same_recipe() -> None:
    recipe = Recipe.parse(
        {
            "model": "tiny",
            "data": {"path": "a.json", "bad_images": "skip"},
            "policy": [{"modules": "language", "method": "milora", "protect": 0, "rank": 4, "sigma": {"floor": 0.1}}],
            "train": {"learning_rate": 2e-5, "warmup_ratio": 0.03, "eval_strategy": "no", "report_to": "none"},
            "eval": {"suites": ["quick"], "limit": 10},
        }
    )
    assert Recipe.parse(read_mapping(recipe.to_yaml(), "again")) == recipe


def test_numbers_without_a_point_are_numbers() -> None:
    assert read_mapping("train:\n  learning_rate: 2e-5\n", "x") == {"train": {"learning_rate": 2e-5}}


def test_a_folder_named_by_a_date_is_text() -> None:
    assert read_mapping("{image_folder: 2026-11-25}", "x") == {"image_folder": "2026-11-25"}


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


def test_a_key_that_is_a_number_is_unknown() -> None:
    with raises_code("recipe-unknown-key", where="train.1", message="unknown key"):
        Recipe.parse({"train": {1: 2}})


WRONG: list[Any] = [[], {}, "x", -1, 0, 1.5, True, float("nan"), [1], {"unknown": 1}, [{"path": "a", "weight": "x"}]]


def keys_of(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (name,)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from ((name, *inner) for inner in keys_of(field.annotation))


@pytest.mark.parametrize("keys", keys_of(Recipe), ids=".".join)
def test_no_message_is_pydantics_own(keys: tuple[str, ...]) -> None:
    """Every wrong value of every key: what was expected and what was found, in our words."""
    for value in WRONG:
        content = value
        for key in reversed(keys):
            content = {key: content}
        try:
            Recipe.parse(content)
        except UserError as error:
            for problem in error.problems:
                assert "should" not in problem.message
                assert problem.code
