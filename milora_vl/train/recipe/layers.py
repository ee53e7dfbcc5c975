"""Settings in layers (an adapter, a recipe file, flags): a value knows where the user set it, and later layers win."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from milora_vl.common.errors import Key


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
