"""Find and read a recipe: by name, file or run folder (`--recipe`). Its values know their lines.

The YAML is strict: duplicate keys are errors, and `2e-5` is a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import llava_recipes
from milora_vl.common.cli.command_line import suggest
from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.common.yaml_text import read_file, read_mapping
from milora_vl.train.recipe.layers import Section, place_of, placed


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe before its checks: its content, and the name of its source."""

    content: Section = field(default_factory=Section)
    source: str = "the command line"
    packaged: str = ""  # name, if it is one of ours

    @classmethod
    def read(cls, content: Mapping[str, Any], lines: Mapping[str, int], source: str, packaged: str = "") -> RecipeFile:
        """Return a recipe whose values know their lines; `lines` has them by dotted key."""
        return cls(placed(content, lambda key: f"{source}:{lines[key]}" if key in lines else ""), source, packaged)

    def where(self, key: Key) -> str:
        """Return where a value stands: its flag, or the file with the line and the key."""
        place = place_of(self.content, key) or self.source
        is_flag = place.startswith("--") and place != "--policy"  # which holds many keys
        return place if is_flag else f"{place}: {key}"

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return the problems with the places of their keys; other places stay.

        The last problem of a packaged recipe has a hint how to make a copy, which a user can edit.
        """
        located = [replace(p, where=self.where(p.where)) if isinstance(p.where, Key) else p for p in problems]
        pairs = enumerate(zip(problems, located, strict=True))
        of_file = [n for n, (old, new) in pairs if old != new and str(new.where).startswith(self.source)]
        if self.packaged and of_file:
            copy = f"make a copy to edit:  python -m milora_vl.train --print-recipe {self.packaged} > mine.yaml"
            last = located[of_file[-1]]
            located[of_file[-1]] = replace(last, hint="\n".join(filter(None, (last.hint, copy))))
        return located


def read_recipe(name: str | None, flag: str = "--recipe") -> RecipeFile:
    """Return a recipe by name or path; an empty one without a name. `flag` is the place of an unknown name."""
    if name is None:
        return RecipeFile()
    if name in llava_recipes.names():
        label = f"recipe {name}"
        return RecipeFile.read(*read_mapping(llava_recipes.read(name), label), label, packaged=name)
    path = Path(name) / "recipe.yaml" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return RecipeFile.read(*read_file(path), str(path))
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
