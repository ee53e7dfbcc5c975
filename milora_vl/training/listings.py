"""`--list-models`, `--list-recipes` and `--print-recipe`: data on stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import yaml

import llava_recipes
from milora_data.errors import UserError
from milora_vl.config import Recipe
from milora_vl.training import hf_arguments, settings
from milora_vl.training.arguments import PROG, Request


def show(request: Request) -> int:
    """Print what the request asks for."""
    text = {"list_models": models, "list_recipes": recipes}.get(request.action)
    sys.stdout.write(text() if text else recipe_text(request))
    return 0


def models() -> str:
    """The named models, one a line."""
    from milora_vl.models import NAMED_MODELS

    return _table({name: str(model) for name, model in NAMED_MODELS.items()})


def recipes() -> str:
    """The packaged recipes with the first line of their comment."""
    return _table({name: llava_recipes.read(name).splitlines()[0].lstrip("# ") for name in llava_recipes.names()})


def recipe_text(request: Request) -> str:
    """A whole recipe: every key with its value, and TrainingArguments at their default as comments."""
    name = request.argument or request.recipe
    if not name:
        raise UserError(f"--print-recipe: which one? {', '.join(llava_recipes.names())}\nsee: {PROG} --list-recipes")
    content, lines, source = settings.read_recipe(name)
    recipe = Recipe.parse(content, source, lines)
    comment = "".join(line for line in _source(name).splitlines(keepends=True) if line.startswith("#"))
    others = [
        f"#  {flag.name}: {yaml.safe_dump(flag.default, default_flow_style=True).splitlines()[0]}\n"
        for flag in hf_arguments.flags().values()
        if flag.versions and flag.versions[-1] == hf_arguments.newest() and flag.name not in recipe.train
        and flag.name not in hf_arguments.REFUSED and flag.name not in hf_arguments.RENAMED
    ]  # fmt: skip
    return comment + recipe.to_yaml() + "# Of train, at their defaults:\n" + "".join(others)


def _source(name: str) -> str:
    return llava_recipes.read(name) if name in llava_recipes.names() else ""


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "".join(f"{name:<{width}}  {text}\n" for name, text in rows.items())
