"""Read a recipe's YAML strictly: duplicate keys are errors, `2e-5` is a number, every key has its line number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from milora_vl.base.errors import UserError
from milora_vl.base.yaml_text import YamlTextError, errors_as_one, require_small

if TYPE_CHECKING:
    from milora_data.pictures.pixels import AspectRatio

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
            require_small(node)
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


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a YAML file as `read` does. Raises UserError if the file cannot be read."""
    try:
        return read(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file: {error}", code="file-unreadable", where=str(path), hint=TEXT) from None


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


def trained_prompts(folder: Path) -> tuple[str, AspectRatio]:
    """Return the template and the image_aspect_ratio of a run, from its recipe.yaml.

    `folder` is a run folder or a checkpoint in it. The defaults are vicuna_v1 and pad, as in LLaVA-1.5. Raises
    UserError if the recipe cannot be read.
    """
    recipe = _recipe_of(folder)
    return recipe.get("template") or "vicuna_v1", (recipe.get("data") or {}).get("image_aspect_ratio") or "pad"


def trained_pixels(folder: Path) -> tuple[int | None, int | None]:
    """Return the limits of pixels (least, most) of a run, from its recipe.yaml; `folder` is as in `trained_prompts`."""
    data = _recipe_of(folder).get("data") or {}
    return data.get("min_pixels"), data.get("max_pixels")


def _recipe_of(folder: Path) -> dict[str, Any]:
    file = next((place / "recipe.yaml" for place in (folder, folder.parent) if (place / "recipe.yaml").is_file()), None)
    return {} if file is None else read_file(file)[0]
