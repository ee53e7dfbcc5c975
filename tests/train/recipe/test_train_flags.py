"""The command line: HF's, LLaVA's and our flags, in either spelling."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import llava_recipes
from milora_vl.common.cli.parser import Command, parser, positive, shared
from milora_vl.common.errors import UserError
from milora_vl.common.yaml_text import read_mapping
from milora_vl.train.__main__ import main, parse
from milora_vl.train.launch import _keywords
from milora_vl.train.settings import RENAMED, Recipe, coerced, known_arguments
from support.plans import settings
from support.problems import raises_code


def test_dashes_and_underscores_are_alike() -> None:
    assert parse(["--output-dir", "a", "--per-device-train-batch-size=4"]) == parse(
        ["--output_dir", "a", "--per_device_train_batch_size", "4"]
    )


@pytest.mark.parametrize("words", [["--bf16"], ["--bf16", "True"], ["--bf16", "true"], ["--bf16=yes"]])
def test_booleans_come_with_and_without_a_value(words: list[str]) -> None:
    assert parse([*words, "--seed", "1"]).overrides["train"] == {"bf16": True, "seed": 1}


def test_flags_land_in_the_recipe() -> None:
    request = parse(
        "--model_name_or_path m --version v1 --model_max_length 64 --image_aspect_ratio square --limit 3".split()
    )
    assert request.overrides == {
        "model": "m",
        "template": "vicuna_v1",
        "data": {"max_length": 64, "image_aspect_ratio": "plain", "limit": 3},
    }


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--lerning_rate", "1"], "command-line", "did you mean --learning_rate"),
        (["--bf16", "maybe"], "command-line", "true or false"),
        (["--rank", "much"], "command-line", "a whole number"),
        (["--seed", "x"], "flag-value", "a whole number, got 'x'"),
        (["--method", "milra"], "flag-value", "did you mean milora"),
        (["--device", "tpu"], "flag-value", "expected cpu, cuda"),
        (["--per_device_train_batch_size", "0"], "flag-value", "at least 1, got '0'"),
        (["--num_train_epochs", "-2"], "flag-value", "above 0"),
        (["--max_steps", "0"], "flag-value", "at least 1, or -1 to train by epochs"),
        (["--adam_beta1", "2"], "flag-value", "below 1"),
        (["--devices", "0", "--dry-run"], "command-line", "at least 1, got 0"),
        (["--learning_rate", "-0.001"], "policy-value", "got -0.001"),
        (["--learning_rate", "-1e-3"], "policy-value", "got -0.001"),
        (["--gpu_memory", "-3", "--dry-run"], "command-line", "must be a number from 0"),
    ],
)
def test_a_mistake_is_named_by_its_code_its_flag_and_the_value(words: list[str], code: str, says: str) -> None:
    with raises_code(code, where=words[0]) as error:
        settings([*words, "--model", "tiny"])
    assert says in str(error.value)
    assert error.value.exit_code == 2


def test_resume_and_actions() -> None:
    assert parse(["--resume_from_checkpoint"]).resume == "true"
    assert parse(["--resume_from_checkpoint", "auto"]).resume == "auto"
    assert parse(["--dry-run"]).action == "dry_run"
    assert parse(["--print-recipe", "a"]).argument == "a"
    assert parse([]).action == "train"


def test_a_mistyped_flag_is_named_where_the_right_one_is_missing() -> None:
    options = parser("prog", "what it does", "example: x")
    options.add_argument("--model", required=True)
    options.add_argument("--limit", type=positive)
    for word in ("--modle", "--modle=tiny"):
        with raises_code("command-line", where="--modle", hint="did you mean --model?"):
            options.parse_args([word, "tiny"])
    with raises_code("command-line", message="required: --model"):
        options.parse_args(["--limit", "3", "--", "--modle"])
    with raises_code("command-line", where="--limit", message="expected a whole number, got 'abc'"):
        options.parse_args(["--model", "a", "--limit", "abc"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("cdua", "expected cpu, cuda, cuda:1, ..., got 'cdua'\ndid you mean cuda?"),
        ("meta", "expected cpu, cuda, cuda:1, ..., got 'meta'"),
        ("cuda", "no device cuda: PyTorch finds no cuda devices"),
        ("cpu:3", "no device cpu:3: PyTorch finds 1 cpu devices"),
    ],
)
def test_a_device_that_is_none_or_not_here_is_refused(word: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    command = Command("prog", "what it does", "example: x", settings=(shared("device"),))
    assert command.parse(["--device", "cpu"]).device == "cpu"
    with pytest.raises(UserError) as error:
        command.parse(["--device", word])
    assert said in str(error.value)


def test_hugging_faces_arguments_are_those_of_its_class() -> None:
    """The flags are read from its source."""
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    own = {name: argument for name, argument in known_arguments().items() if name in fields}
    assert fields.keys() - own.keys() == {"parallelism_config"}
    assert known_arguments().keys() - own.keys() <= {*RENAMED, *RENAMED.values()}
    for name, argument in own.items():
        if fields[name].default is not dataclasses.MISSING:
            assert argument.default == fields[name].default, name


def test_a_misspelt_flag_is_refused_before_torch_is_imported() -> None:
    code = "import sys; from milora_vl.train.__main__ import parse; parse(['--modell', 'x', '--resume'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert "--modell: unknown argument" in done.stderr
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.MULTILINE)


def test_what_a_recipe_holds_is_what_training_arguments_take(tmp_path: Path) -> None:
    given = {"warmup_ratio": 0.1, "evaluation_strategy": "no", "gradient_checkpointing": True}
    train = Recipe.parse({"train": given}).train
    args = TrainingArguments(output_dir=str(tmp_path), **_keywords(train))
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
        ("logging_steps", 5, 5),
    ],
)
def test_values_are_read_as_their_types(name: str, value: object, expected: object) -> None:
    found = coerced(name, value)
    assert (found, type(found)) == (expected, type(expected))


def printed(capsys: Any, *words: str) -> str:
    assert main(list(words)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return str(captured.out)


def test_recipes_and_models_are_listed_one_a_line(capsys: Any) -> None:
    assert [line.split()[0] for line in printed(capsys, "--list-recipes").splitlines()] == llava_recipes.names()
    assert "llava-1.5-7b " in printed(capsys, "--list_models")


@pytest.mark.parametrize("name", ["tiny-test", "milora-llava-1.5-7b"])
def test_a_printed_recipe_is_the_recipe_with_every_key(name: str, capsys: Any) -> None:
    text = printed(capsys, "--print-recipe", name)
    content = read_mapping(text, "printed")
    assert content.keys() == Recipe.model_fields.keys()
    original = read_mapping(llava_recipes.read(name), name)
    assert Recipe.parse(content) == Recipe.parse(original)
    assert text.startswith("#")
