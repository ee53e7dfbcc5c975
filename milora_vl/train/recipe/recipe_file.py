"""Find and read a recipe: by name, file or run folder (`--recipe`). Its content keeps the line of every key.

The YAML is strict: duplicate keys are errors, and `2e-5` is a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import llava_recipes
from milora_vl.common.cli.command_line import suggest
from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.common.yaml_text import read_file, read_mapping
from milora_vl.train.recipe.hf_flags import RENAMED


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe before its checks: the content, the line of each dotted key, and the name of its source."""

    content: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    source: str = "the command line"
    packaged: str = ""  # name, if it is one of ours

    def line_of(self, key: Key) -> int | None:
        """Return the line of a key, which may have an older name of the setting."""
        older = [old for old, new in RENAMED.items() if key.parts == ("train", new)]
        names = [str(key), *(f"train.{name}" for name in older)]
        return next((self.lines[name] for name in names if name in self.lines), None)

    def place_of(self, key: Key) -> str:
        """Return this file with the line of a key, and the key."""
        line = self.line_of(key)
        return f"{self.source}{'' if line is None else f':{line}'}: {key}"

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return the problems with this file and the line in front of their keys; other places stay.

        The last problem of a packaged recipe has a hint how to make a copy, which a user can edit.
        """
        placed, last = list(problems), None
        for number, problem in enumerate(problems):
            if isinstance(problem.where, Key):
                placed[number], last = replace(problem, where=self.place_of(problem.where)), number
        if self.packaged and last is not None:
            copy = f"make a copy to edit:  python -m milora_vl.train --print-recipe {self.packaged} > mine.yaml"
            placed[last] = replace(placed[last], hint="\n".join(filter(None, (placed[last].hint, copy))))
        return placed


def read_recipe(name: str | None, flag: str = "--recipe") -> RecipeFile:
    """Return a recipe by name or path; an empty one without a name. `flag` is the place of an unknown name."""
    if name is None:
        return RecipeFile()
    if name in llava_recipes.names():
        label = f"recipe {name}"
        return RecipeFile(*read_mapping(llava_recipes.read(name), label), label, packaged=name)
    path = Path(name) / "recipe.yaml" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return RecipeFile(*read_file(path), str(path))
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
