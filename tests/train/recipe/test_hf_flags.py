"""HF's training arguments: names of older versions, types, limits."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

from milora_vl.train import arguments
from milora_vl.train.recipe import Recipe


def test_what_a_recipe_holds_is_what_training_arguments_take(tmp_path: Path) -> None:
    given = {"warmup_ratio": 0.1, "evaluation_strategy": "no", "gradient_checkpointing": True, "group_by_length": True}
    train = Recipe.parse({"train": given}).train
    args = TrainingArguments(output_dir=str(tmp_path), **arguments.keywords(train))
    assert args.get_warmup_steps(50) == 5
    assert args.gradient_checkpointing


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_train_epochs", "2", 2.0),
        ("max_steps", 3.0, 3),
        ("report_to", "wandb", "wandb"),
        ("report_to", ["wandb", "tensorboard"], ["wandb", "tensorboard"]),
        ("lr_scheduler_kwargs", '{"min_lr": 1}', {"min_lr": 1}),
        ("eval_steps", "None", None),
        ("eval_strategy", False, "no"),
        ("tf32", "False", False),
        ("fsdp", "false", None),  # off, as in transformers
        ("fsdp", "", None),
        ("logging_steps", 5, 5),
        ("debug", ["underflow_overflow"], "underflow_overflow"),
        ("log_level", "WARNING", "warning"),
    ],
)
def test_values_are_read_as_their_types(name: str, value: object, expected: object) -> None:
    found = arguments.coerce(name, value)
    assert (found, type(found)) == (expected, type(expected))
