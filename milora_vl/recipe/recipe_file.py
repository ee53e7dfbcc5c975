"""Find and read a recipe by name, file or run folder (`--recipe`); its content keeps the line of every key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llava_recipes
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import suggest
from milora_vl.recipe import yaml_file


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe as it was read: unchecked content, the line of each dotted key, and the name of its source."""

    content: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    source: str = "the command line"


def read_recipe(name: str | None, flag: str = "--recipe") -> RecipeFile:
    """Return a recipe by name or path; an empty one without a name. `flag` is the place of an unknown name."""
    if name is None:
        return RecipeFile()
    if name in llava_recipes.names():
        label = f"recipe {name}"
        return RecipeFile(*yaml_file.read(llava_recipes.read(name), label), label)
    path = Path(name) / "recipe.yaml" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return RecipeFile(*yaml_file.read_file(path), str(path))
    near = suggest(name, llava_recipes.names())
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes: {', '.join(llava_recipes.names())}"
    found = "no packaged recipe and no file has this name"
    if Path(name).is_dir():
        found = "this is a folder without a recipe.yaml"
    raise UserError(
        f"unknown recipe {name!r}: {found}",
        code="recipe-unknown",
        where=flag,
        hint=f"{hint}\nsee: python -m milora_vl.train --list-recipes",
    )
