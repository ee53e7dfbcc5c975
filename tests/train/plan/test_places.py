"""Errors of a run name the place where the user sets a value: the flag, or file and key of the recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from milora_vl.train import data, main
from support.problems import raises_code

WORDS = ["--model", "tiny", "--rank", "4", "--device", "cpu"]


@pytest.mark.parametrize(
    ("words", "code", "where"),
    [
        ("--image_aspect_ratio anyres", "image-aspect-ratio", "--image_aspect_ratio"),
        ("--max_pixels 9", "pixels-unsupported", "--max_pixels"),
        ("--eval_strategy steps", "train-arguments", "--eval_strategy"),
        ("--evaluation_strategy steps", "train-arguments", "--evaluation_strategy"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_at_its_flag(words: str, code: str, where: str, tmp_path: Path) -> None:
    typed = WORDS[:2] + WORDS[4:] if "--policy" in words else WORDS
    with raises_code(code) as error:
        main([*typed, *shlex.split(words), "--output_dir", str(tmp_path / "run")])
    assert error.value.first.where == where


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ("data:\n  image_aspect_ratio: anyres\n", "image-aspect-ratio", "data.image_aspect_ratio"),
        ("train:\n  max_steps: 2\n  optim: adalomo\n", "train-arguments", "train.optim"),
        ("train:\n  eval_strategy: steps\n", "train-arguments", "train.eval_strategy"),
        ("eval:\n  suite_every: 2\n", "flag-needs-another", "eval.suite_every"),
        ("factor_cache: FILE\n", "path-not-a-folder", "factor_cache"),
    ],
)
def test_a_value_of_a_recipe_is_at_its_key(text: str, code: str, where: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: tiny\n" + text.replace("FILE", str(recipe)))
    with raises_code(code) as error:
        main(["--recipe", str(recipe), *WORDS[2:], "--output_dir", str(tmp_path / "run")])
    assert error.value.first.where == f"{where} in {recipe}"


@pytest.mark.parametrize(
    ("words", "code", "where"),
    [
        ("--fsdp foo", "launch-fsdp", "--fsdp"),
        ("--eval_suite_every 1", "flag-needs-another", "--eval_suite_every"),
        ("--factor_cache FILE", "path-not-a-folder", "--factor_cache"),
    ],
)
def test_mistakes_that_need_no_data_are_found_before_the_records_are_read(
    words: str, code: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("the records were read")

    monkeypatch.setattr(data, "read_records", read)
    file = tmp_path / "train.json"
    file.write_text("[]")
    typed = words.replace("FILE", str(file)).split()
    with raises_code(code, where=where):
        main([*WORDS, "--data_path", str(file), *typed, "--output_dir", str(tmp_path / "run")])
