"""Parse YAML of plain data: duplicate keys are errors, `2e-5` is a number; all errors of PyYAML become one class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from milora_vl.common.errors import UserError

TEXT = "expected a YAML file, as text in UTF-8"
FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")


class YamlTextError(ValueError):
    """The text is not valid YAML."""


class _Loader(yaml.SafeLoader):
    """Loader that refuses duplicate keys and reads `2e-5` as a number and 2026-11-25 as text.

    PyYAML follows YAML 1.1, where `2e-5` is a string (so a learning rate would be text) and a folder named 2026-11-25
    is a date.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+.0123456789":
    resolvers = _Loader.yaml_implicit_resolvers.setdefault(_first, [])
    resolvers[:] = [r for r in resolvers if r[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    resolvers.append(("tag:yaml.org,2002:float", FLOAT))


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, None if it is empty. Raises YamlTextError with PyYAML's line.

    >>> parse_yaml("a: [1, 2e-5]")
    {'a': [1, 2e-05]}
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1})" if mark else ""
        raise YamlTextError(f"{error.problem or error.context}{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an invalid character; a value unlike its tag
        raise YamlTextError(str(error).splitlines()[0]) from None


def read_file(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, as `read_mapping`. Raises UserError if the file cannot be read."""
    try:
        return read_mapping(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file: {error}", code="file-unreadable", where=str(path), hint=TEXT) from None


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """Return the mapping in `text`. Raises UserError at `source` for invalid YAML, or anything but a mapping."""
    try:
        content = parse_yaml(text)
    except YamlTextError as error:
        hint = "correct it; values with : or # need quotes"
        raise UserError(f"not valid YAML: {error}", code="yaml-syntax", where=source, hint=hint) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        hint = "a recipe starts with, for example,  model: llava-1.5-7b"
        message = "expected a mapping of keys (model, data, policy, train, ...)"
        raise UserError(message, code="yaml-not-a-mapping", where=source, hint=hint)
    return content
