"""`python -m milora_vl.train`: parse the flags, then dry run, listing or training."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

import yaml

import llava_recipes
from milora_vl.common.errors import UserError
from milora_vl.models.names import NAMED_MODELS
from milora_vl.train import arguments
from milora_vl.train.flags import PROG, Request, parse
from milora_vl.train.merge import merge
from milora_vl.train.recipe import Recipe, read_recipe


def main(argv: Sequence[str] | None = None) -> int:
    request = parse(argv)
    if request.action in ("print_recipe", "list_models", "list_recipes"):
        return show(request)
    settings = merge(request)
    with settings.places():
        if request.action == "dry_run":
            from milora_vl.train import dry_run

            return dry_run.show(settings)
        from milora_vl.train import run

        return run.train(settings)


def show(request: Request) -> int:
    as_json = request.format == "json"
    if request.action == "print_recipe":
        text = _recipe_text(request, as_json=as_json)
    else:
        rows: Mapping[str, str] = {name: str(model) for name, model in NAMED_MODELS.items()}
        if request.action == "list_recipes":
            rows = {name: llava_recipes.read(name).splitlines()[0].lstrip("# ") for name in llava_recipes.names()}
        width = max(map(len, rows))
        table = "".join(f"{name:<{width}}  {about}\n" for name, about in rows.items())
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n" if as_json else table
    sys.stdout.write(text)
    return 0


def _recipe_text(request: Request, *, as_json: bool) -> str:
    """Return a recipe with every key, as JSON, or as YAML with the defaults of TrainingArguments as comments."""
    name = request.argument or request.recipe
    if not name:
        message = f"expected the name of a recipe: {', '.join(llava_recipes.names())}"
        raise UserError(message, code="flag-required", where="--print-recipe", hint=f"see: {PROG} --list-recipes")
    recipe = Recipe.parse(*read_recipe(name, "--print_recipe" if request.argument else "--recipe"))
    if as_json:
        return json.dumps(recipe.model_dump(mode="json")) + "\n"
    source = llava_recipes.read(name) if name in llava_recipes.names() else ""
    comment = "".join(line for line in source.splitlines(keepends=True) if line.startswith("#"))
    others = [
        f"#  {name}: {yaml.safe_dump(argument.default, default_flow_style=True).splitlines()[0]}\n"
        for name, argument in arguments.known().items()
        if name not in {*recipe.train, *arguments.REFUSED, *arguments.RENAMED}
    ]
    return comment + recipe.to_yaml() + "# Defaults of train:\n" + "".join(others)
