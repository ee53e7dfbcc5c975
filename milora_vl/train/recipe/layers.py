"""Settings in layers (an adapter, a recipe file, flags): a value knows where the user set it, and later layers win.

`read_recipe` finds a recipe by name, file or run folder (`--recipe`). Its YAML is strict: duplicate keys are errors,
and `2e-5` is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import llava_recipes
from milora_vl.common.cli.command_line import suggest
from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.common.yaml_text import read_file, read_mapping


class Section(dict[str, Any]):
    """A mapping that knows where each of its values stands: a file with its line, or a flag (`--rank`).

    `place` is where the mapping itself stands if it is an item of a list.
    """

    def __init__(
        self, values: Mapping[str, Any] | None = None, places: Mapping[str, str] | None = None, place: str = ""
    ) -> None:
        super().__init__(values or {})
        self.places = dict(places or {})
        self.place = place

    def put(self, name: str, value: Any, place: str) -> None:
        """Set a value, and where it stands if that is known."""
        self[name] = value
        self.places.pop(name, None)
        if place:
            self.places[name] = place

    def without(self, names: Iterable[str]) -> Section:
        """Return a copy without some keys."""
        return Section({name: value for name, value in self.items() if name not in set(names)}, self.places, self.place)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Section:
        """Return a copy of a mapping, with its places if it has some."""
        return cls(values, values.places, values.place) if isinstance(values, Section) else cls(values)


def placed(content: Mapping[str, Any], place_at: Callable[[str], str], above: str = "") -> Section:
    """Return nested mappings and lists as sections; `place_at` returns the place of a dotted key, or nothing.

    >>> section = placed({"data": {"limit": 3}}, lambda key: "a.yaml:7" if key == "data.limit" else "")
    >>> place_of(section, Key.of("data.limit"))
    'a.yaml:7'
    """

    def inside(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            section = placed(value, place_at, key)
            section.place = place_at(key) if key.endswith("]") else ""
            return section
        if isinstance(value, list):
            return [inside(item, f"{key}[{number}]") for number, item in enumerate(value)]
        return value

    section = Section()
    for name, value in content.items():
        key = f"{above}.{name}" if above else str(name)
        section.put(name, inside(value, key), place_at(key))
    return section


def merged(*layers: Mapping[str, Any]) -> Section:
    """Return the values of all layers; mappings are merged key by key, and of any other value the last one stays."""
    content = Section()
    for layer in map(Section.of, layers):
        for name, value in layer.items():
            below = content.get(name)
            if isinstance(value, Mapping) and isinstance(below, Mapping):
                value = merged(below, value)
            content.put(name, value, layer.places.get(name) or content.places.get(name, ""))
    return content


def place_of(content: Any, key: Key) -> str:
    """Return where a value stands, or nothing if nobody has set it.

    A missing key of an item of a list stands where the item does, and an item that is no mapping where its list does.
    """
    *above, last = key.parts
    holder = content
    for part in above:
        try:
            holder = holder[part]
        except (LookupError, TypeError):
            return ""
    if isinstance(holder, Section):
        return holder.places.get(str(last), holder.place)
    if isinstance(holder, list) and isinstance(last, int):
        item = holder[last] if last < len(holder) else None
        return item.place if isinstance(item, Section) else place_of(content, Key(tuple(above)))
    return ""


def plain(value: Any) -> Any:
    """Return a value without places: mappings are dicts, as YAML and JSON write them."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


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
