"""Parse YAML of plain data, also with the line of each key; all errors of PyYAML become one class, with the line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from milora_vl.common.errors import UserError

TEXT = "expected a YAML file, as text in UTF-8"
FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")


class YamlTextError(ValueError):
    """The text is not valid YAML. `line` is the number of its line from 1, if it is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, None if it is empty. Raises YamlTextError.

    >>> parse_yaml("a: [1, 2e-5]")
    {'a': [1, 2e-05]}
    """
    with errors_as_one():
        return yaml.load(text, _Loader)


@contextmanager
def errors_as_one() -> Iterator[None]:
    """Turn the errors of PyYAML into YamlTextError."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlTextError(str(error.problem or error.context), mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:  # an invalid character
        raise YamlTextError(str(error).splitlines()[0]) from None
    except YamlTextError:
        raise
    except ValueError as error:  # a value that does not fit its tag, such as a date
        raise YamlTextError(str(error)) from None


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


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the mapping in a YAML file, as `read_mapping`. Raises UserError if the file cannot be read."""
    try:
        return read_mapping(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the file: {error}",
            code="file-unreadable",
            where=str(path),
            hint=TEXT,
        ) from None


def read_mapping(text: str, source: str, *, above: int = 0) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the mapping in `text`, and the line of each dotted path (`policy[1].rank` -> 12).

    `above`: the number of lines at the start of `text` that are not in `source`.
    Raises UserError, with `source` and the line, for invalid YAML, a duplicate key, or anything but a mapping.

    >>> read_mapping("train: {learning_rate: 2e-5}", "x.yaml")
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
