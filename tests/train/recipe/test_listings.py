"""What the command prints about models and recipes: data, on stdout."""

from __future__ import annotations

from typing import Any

import pytest

import llava_recipes
from milora_vl.common.yaml_text import read_mapping
from milora_vl.train.command import main
from milora_vl.train.recipe import Recipe


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
    assert "#  adam_beta1: 0.9" in text
    assert text.startswith("#")
