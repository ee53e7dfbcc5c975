"""`--list-models`, `--list-recipes` and `--print-recipe`: print data to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import yaml

import llava_recipes
from milora_vl.common.errors import UserError
from milora_vl.models.names import NAMED_MODELS
from milora_vl.train.recipe import hf_flags
from milora_vl.train.recipe.flags import PROG, Request
from milora_vl.train.recipe.layers import read_recipe
from milora_vl.train.recipe.schema import Recipe


def show(request: Request) -> int:
    """Print what the request asks for."""
    as_json = request.format == "json"
    if request.action == "print_recipe":
        text = json.dumps(_recipe(request)[1].model_dump(mode="json")) + "\n" if as_json else recipe_text(request)
    else:
        rows = models() if request.action == "list_models" else recipes()
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n" if as_json else _table(rows)
    sys.stdout.write(text)
    return 0


def models() -> dict[str, str]:
    """Return the named models and the source of each."""

    return {name: str(model) for name, model in NAMED_MODELS.items()}


def recipes() -> dict[str, str]:
    """Return the packaged recipes with the first line of their comment."""
    return {name: llava_recipes.read(name).splitlines()[0].lstrip("# ") for name in llava_recipes.names()}


def recipe_text(request: Request) -> str:
    """Return a recipe as YAML: every key with its value; TrainingArguments with their default as comments."""
    name, recipe = _recipe(request)
    comment = "".join(line for line in _source(name).splitlines(keepends=True) if line.startswith("#"))
    others = [
        f"#  {flag.name}: {yaml.safe_dump(flag.default, default_flow_style=True).splitlines()[0]}\n"
        for flag in hf_flags.flags().values()
        if flag.name not in {*recipe.train, *hf_flags.REFUSED, *hf_flags.RENAMED}
    ]  # fmt: skip
    return comment + recipe.to_yaml() + "# Defaults of train:\n" + "".join(others)


def _recipe(request: Request) -> tuple[str, Recipe]:
    name = request.argument or request.recipe
    if not name:
        raise UserError(
            f"expected the name of a recipe: {', '.join(llava_recipes.names())}",
            code="flag-required",
            where="--print-recipe",
            hint=f"see: {PROG} --list-recipes",
        )
    file = read_recipe(name, "--print_recipe" if request.argument else "--recipe")
    return name, Recipe.parse(file.content, file)


def _source(name: str) -> str:
    return llava_recipes.read(name) if name in llava_recipes.names() else ""


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "".join(f"{name:<{width}}  {text}\n" for name, text in rows.items())
