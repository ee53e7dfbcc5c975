"""Read a YAML file strictly: no key twice, `2e-5` is a number, and every value knows its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from milora_data.errors import UserError

if TYPE_CHECKING:
    from milora_data.pixels import AspectRatio

FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where `2e-5` is a string (a learning rate would silently be text) and a folder named
    2026-11-25 a date.
    """


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+.0123456789":
    resolvers = _Loader.yaml_implicit_resolvers.setdefault(_first, [])
    resolvers[:] = [r for r in resolvers if r[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    resolvers.append(("tag:yaml.org,2002:float", FLOAT))


def read(text: str, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in `text`, and the line of each dotted path (`policy[1].rank` -> 12).

    Raises UserError, with `source` and the line, for broken YAML, a key given twice, or anything but a mapping.

    >>> read("train: {learning_rate: 2e-5}", "x.yaml")
    ({'train': {'learning_rate': 2e-05}}, {'train': 1, 'train.learning_rate': 1})
    """
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{source}: a recipe is a mapping of keys (model, data, policy, train, ...)")
        _walk(node, "", lines, source)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # a character that no text has
        raise UserError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """`read` for a file; UserError where it cannot be read."""
    try:
        return read(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _walk(node: yaml.Node, path: str, lines: dict[str, int], source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            if inner in lines:
                raise UserError(
                    f"{source}:{key.start_mark.line + 1}: {inner} is given twice (first on line {lines[inner]})"
                )
            lines[inner] = key.start_mark.line + 1
            _walk(value, inner, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[f"{path}[{i}]"] = value.start_mark.line + 1
            _walk(value, f"{path}[{i}]", lines, source)


def trained_prompts(folder: Path) -> tuple[str, AspectRatio]:
    """Return the template, and what is done to pictures, that a run was trained with, by its recipe.yaml.

    `folder` is the run's or that of a checkpoint in it; vicuna_v1 and pad, LLaVA-1.5's, where nothing says so. Raises
    UserError for a recipe that cannot be read.
    """
    file = next((place / "recipe.yaml" for place in (folder, folder.parent) if (place / "recipe.yaml").is_file()), None)
    recipe = {} if file is None else read_file(file)[0]
    return recipe.get("template") or "vicuna_v1", (recipe.get("data") or {}).get("image_aspect_ratio") or "pad"
