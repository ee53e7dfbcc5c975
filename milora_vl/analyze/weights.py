"""Read the weights of a model from its files, one matrix at a time, without loading the model (to save memory).

The keys in the files may differ from the module paths, because transformers renames weights on loading. Both have the
same canonical names (`towers.canonical_names`), which match them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from milora_vl.core.policy.towers import Towers, canonical_names, find_towers
from milora_vl.core.weights.matrices import as_matrix, is_adaptable, is_linear, matrix_shape, read_matrix
from milora_vl.models import loading


@dataclass(frozen=True, slots=True)
class Weights:
    """The matrices of a model by module path. `stored` holds (file, key) of each; None if `model` has the weights."""

    name: str
    model: nn.Module
    towers: Towers
    stored: Mapping[str, tuple[Path, str]] | None

    @classmethod
    def of(cls, model: nn.Module, name: str = "") -> Weights:
        """Return the weights of a loaded model."""
        return cls(name, model, find_towers(model), None)

    def paths(self) -> list[str]:
        """Return the paths of the matrices to analyse: linear layers and convolutions of blocks and projector."""
        paths = []
        for path, module in self.model.named_modules():
            if not self.has(path):
                continue
            is_matrix = is_linear(module) or (isinstance(module, nn.Conv2d) and module.groups == 1)
            inside = self.towers.block_of(path) is not None or self.towers.tower_of(path) == "projector"
            if is_matrix and inside:
                paths.append(path)
        return paths or [path for path, module in self.model.named_modules() if is_linear(module)]

    def has(self, path: str) -> bool:
        """Return whether there is a matrix at this path."""
        if self.stored is not None:
            return path in self.stored
        try:
            return is_adaptable(self.model.get_submodule(path))
        except AttributeError:
            return False

    def shape(self, path: str) -> tuple[int, int]:
        """Return the shape (out, in) of a matrix."""
        return matrix_shape(self.model.get_submodule(path))

    def matrix(self, path: str) -> Tensor:
        """Return the weight at `path` as a matrix (out, in) in its stored data type."""
        module = self.model.get_submodule(path)
        if self.stored is None:
            return read_matrix(module)
        file, key = self.stored[path]
        with safe_open(file, framework="pt") as opened:
            return as_matrix(module, opened.get_tensor(key))

    def as_stored(self, path: str, tensor: Tensor) -> Tensor:
        """Return a saved weight of the module at `path` as a matrix (out, in)."""
        return as_matrix(self.model.get_submodule(path), tensor)


def open_weights(name: str) -> Weights:
    """Return the weights of a model by name, folder or hub id. The model is loaded only if its files do not match.

    Raises UserError if the model is not available.
    """
    folder = loading.weights_folder(name)
    if folder is not None:
        model = loading.meta_model(loading.config_of(name))
        stored = _locations(folder, model)
        if stored is not None:
            return Weights(name, model, find_towers(model), stored)
        sys.stderr.write(f"{name}: the names in its files do not match its modules; loading the full model\n")
    return Weights.of(loading.load_weights(name), name)


def _locations(folder: Path, model: nn.Module) -> dict[str, tuple[Path, str]] | None:
    """Return (file, key) of every matrix of `model` by path; None if one is missing (a head may be).

    The files contain one of two tied embeddings; both paths get it.
    """
    files = _files(folder)
    keys: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - a method, not a mapping
                keys[key] = (file, tuple(opened.get_slice(key).get_shape()))
    in_files = canonical_names(_skeleton({key: shape for key, (_, shape) in keys.items()}))
    by_name = {name: path for path, name in in_files.items()}
    locations = {}
    for path, name in canonical_names(model).items():
        module = model.get_submodule(path)
        if not is_adaptable(module):
            continue
        key = f"{by_name.get(name, path)}.weight"
        if key in keys and _same_size(keys[key][1], module):
            locations[path] = (keys[key][0], key)
        elif not isinstance(module, nn.Embedding) and "head" not in path:
            return None
    return _tied(model, locations) | locations


def _tied(model: Any, locations: Mapping[str, tuple[Path, str]]) -> dict[str, tuple[Path, str]]:
    """Return the location of token embeddings and head, if the config of the model ties them."""
    configs = (model.config, model.config.get_text_config())
    if not any(config.to_dict().get("tie_word_embeddings") for config in configs):
        return {}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [path for path, module in model.named_modules() if any(module is end for end in ends)]
    known = next((locations[path] for path in paths if path in locations), None)
    return {} if known is None else dict.fromkeys(paths, known)


def _same_size(shape: tuple[int, ...], module: nn.Module) -> bool:
    return shape == tuple(module.get_parameter("weight").shape)


def _files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, from its index if it has one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _skeleton(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Return empty modules with the paths of the keys: the layout of a file for `find_towers`."""
    tree: dict[str, dict] = {}  # type: ignore[type-arg]
    for key in shapes:
        node = tree
        for part in key.split(".")[:-1]:
            node = node.setdefault(part, {})

    def build(node: Mapping[str, dict], prefix: str) -> nn.Module:  # type: ignore[type-arg]
        numbered = bool(node) and all(part.isdecimal() for part in node)
        module: nn.Module = nn.ModuleList() if numbered else nn.Module()
        for part, inner in node.items():
            module.add_module(part, build(inner, f"{prefix}{part}."))
        weight = shapes.get(f"{prefix}weight")
        if weight is not None:
            module.register_parameter("weight", nn.Parameter(torch.empty(weight, device="meta"), requires_grad=False))
        return module

    return build(tree, "")
