"""Find and read a recipe: by name, file or run folder (`--recipe`). Its content keeps the line of every key.

The YAML is strict: duplicate keys are errors, and `2e-5` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

import llava_recipes
from milora_vl.common.cli.command_line import suggest
from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.common.yaml_text import YamlTextError, errors_as_one
from milora_vl.train.recipe.hf_flags import RENAMED

FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
TEXT = "expected a YAML file, as text in UTF-8"


class _Loader(yaml.SafeLoader):
    """Loader that reads `2e-5` as a number and 2026-11-25 as text.

    PyYAML follows YAML 1.1, where `2e-5` is a string (so a learning rate would be text) and a folder named 2026-11-25
    is a date.
    """


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+.0123456789":
    resolvers = _Loader.yaml_implicit_resolvers.setdefault(_first, [])
    resolvers[:] = [r for r in resolvers if r[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    resolvers.append(("tag:yaml.org,2002:float", FLOAT))


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
        return RecipeFile(*read(llava_recipes.read(name), label), label, packaged=name)
    path = Path(name) / "recipe.yaml" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return read_file(path)
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


def read_file(path: Path) -> RecipeFile:
    """Return the recipe in a YAML file. Raises UserError if the file cannot be read."""
    try:
        return RecipeFile(*read(path.read_text(encoding="utf-8"), str(path)), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file: {error}", code="file-unreadable", where=str(path), hint=TEXT) from None


def read(text: str, source: str, *, above: int = 0) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the mapping in `text`, and the line of each dotted path (`policy[1].rank` -> 12).

    `above`: the number of lines at the start of `text` that are not in `source`.
    Raises UserError, with `source` and the line, for invalid YAML, a duplicate key, or anything but a mapping.

    >>> read("train: {learning_rate: 2e-5}", "x.yaml")
    ({'train': {'learning_rate': 2e-05}}, {'train': 1, 'train.learning_rate': 1})
    """
    lines: dict[str, int] = {}
    try:
        with errors_as_one():
            loader = _Loader(text)
            loader.line = -above  # the line numbers of all marks follow it
            node = loader.get_single_node()
            if node is None:
                return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError(
                "expected a mapping of keys (model, data, policy, train, ...)",
                code="yaml-not-a-mapping",
                where=source,
                hint="a recipe starts with, for example,  model: llava-1.5-7b",
            )
        _walk(node, "", lines, source)
        with errors_as_one():
            return loader.construct_document(node), lines
    except YamlTextError as error:
        line = f":{error.line}" if error.line else ""
        raise UserError(
            f"not valid YAML: {error}",
            code="yaml-syntax",
            where=f"{source}{line}",
            hint="correct the line; values with : or # need quotes",
        ) from None


def _walk(node: yaml.Node, path: str, lines: dict[str, int], source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            if inner in lines:
                raise UserError(
                    f"duplicate key {inner} (first on line {lines[inner]})",
                    code="yaml-duplicate-key",
                    where=f"{source}:{key.start_mark.line + 1}",
                    hint="remove one of both",
                )
            lines[inner] = key.start_mark.line + 1
            _walk(value, inner, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[f"{path}[{i}]"] = value.start_mark.line + 1
            _walk(value, f"{path}[{i}]", lines, source)


def recipe_of_run(folder: Path) -> dict[str, Any]:
    """Return the content of the recipe.yaml in a run folder, or in the folder above a checkpoint; empty without one.

    Raises UserError if the recipe cannot be read.
    """
    file = next((place / "recipe.yaml" for place in (folder, folder.parent) if (place / "recipe.yaml").is_file()), None)
    return {} if file is None else read_file(file).content


def trained_template(folder: Path) -> str:
    """Return the template of a run, by default LLaVA-1.5's. `folder` is as in `recipe_of_run`."""
    return recipe_of_run(folder).get("template") or "vicuna_v1"
