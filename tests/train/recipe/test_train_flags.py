"""The command line: HF's, LLaVA's and our flags, in either spelling."""

from __future__ import annotations

import pytest

from milora_vl.train.flags import parse
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
        (["--eval_strategy", "sometimes"], "flag-value", "no, steps, epoch"),
        (["--device", "tpu"], "flag-value", "expected cpu, cuda"),
        (["--optim", "adamw_trch"], "flag-value", "did you mean adamw_torch?"),
        (["--per_device_train_batch_size", "0"], "flag-value", "at least 1, got '0'"),
        (["--num_train_epochs", "-2"], "flag-value", "above 0"),
        (["--max_steps", "0"], "flag-value", "at least 1, or -1 to train by epochs"),
        (["--adam_beta1", "2"], "flag-value", "below 1"),
        (["--devices", "0", "--dry-run"], "command-line", "at least 1, got 0"),
        (["--learning_rate", "-0.001"], "policy-value", "got -0.001"),
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
