"""The packaged list of HF's flags agrees with the installed transformers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from milora_vl.train.recipe import hf_flags
from milora_vl.train.recipe.schema import Recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "reference"))
import make_hf_flags


def test_the_list_is_that_of_the_installed_transformers() -> None:
    """If this fails: python tests/reference/make_hf_flags.py."""
    installed, known = make_hf_flags.flags(), hf_flags.flags()
    if not installed.keys() >= known.keys() - hf_flags.OLDER.keys():
        pytest.skip("an older transformers is installed")
    assert installed.keys() <= known.keys()
    for name, flag in installed.items():
        listed = known[name].type, list(known[name].choices), known[name].default
        assert (flag["type"], flag["choices"], flag["default"]) == listed, name


def test_what_a_recipe_holds_is_what_training_arguments_take(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    given = {"warmup_ratio": 0.1, "evaluation_strategy": "no", "gradient_checkpointing": True, "group_by_length": True}
    train = Recipe.parse({"train": given}).train
    fields = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}
    arguments, absent = hf_flags.for_installed(train, fields)
    assert absent == []
    args = TrainingArguments(output_dir=str(tmp_path), **arguments)
    assert args.get_warmup_steps(50) == 5
    assert args.gradient_checkpointing


def test_an_older_transformers_gets_its_own_names() -> None:
    train = {"warmup_steps": 0.1, "activation_checkpointing": True}
    fields = dict.fromkeys(["warmup_steps", "gradient_checkpointing"])
    expected = {"warmup_steps": 0.1, "gradient_checkpointing": True}
    assert hf_flags.for_installed(train, fields) == (expected, [])
    assert hf_flags.for_installed({"use_cache": True, "log_level": "passive"}, fields) == ({}, ["use_cache"])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_train_epochs", "2", 2.0),
        ("max_steps", 3.0, 3),
        ("report_to", "wandb", ["wandb"]),
        ("lr_scheduler_kwargs", '{"min_lr": 1}', {"min_lr": 1}),
        ("eval_steps", "None", None),
        ("tf32", "False", False),
        ("fsdp", "false", None),  # off, as in transformers
        ("fsdp", False, None),
        ("fsdp", "", None),
    ],
)
def test_values_are_read_as_their_types(name: str, value: object, expected: object) -> None:
    assert hf_flags.coerce(name, value) == expected


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("log_level", "wrning", "warning"),
        ("debug", "foo", ""),
        ("lr_scheduler_kwargs", "nonsense", "example"),
        ("lr_scheduler_kwargs", "{1", ""),
        ("logging_steps", "-1", ""),
    ],
)
def test_values_that_hugging_face_checks_late_are_refused_at_once(name: str, value: str, hint: str) -> None:
    with pytest.raises(hf_flags.WrongValue) as error:
        hf_flags.coerce(name, value)
    assert hint in error.value.hint
