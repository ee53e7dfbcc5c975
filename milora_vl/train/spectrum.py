"""Measure the singular values of one layer per tower for the report (spectrum.json): the band that trains.

They are measured on the weights of the base model and written to `spectrum.json` in the run folder.
`report/plots.py` draws them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypedDict

from torch import nn

from milora_vl.core.adapter.lora import base_model_of
from milora_vl.core.policy import Target
from milora_vl.core.policy.rules import METHODS
from milora_vl.core.policy.towers import TOWERS, find_towers
from milora_vl.core.svd import singular_values
from milora_vl.core.weights.matrices import is_linear, matrix_shape, read_matrix

# The output matrix of a block's MLP, by its names in Llama, GPT-2, CLIP and related models.
_MLP_OUT = re.compile(r"(mlp|feed_forward|ffn|output)\.(down_proj|c_proj|fc2|w2|dense|dense_4h_to_h)$")
# PEFT keeps the base layer inside its wrappers. No target has the path of one of PEFT's own layers.
_WRAPPER = re.compile(r"\.(base_layer|original_module)\b")
# svdvals of an (m, n) matrix takes about m * n * min(m, n) / 7e9 seconds on one CPU core.
_MAX_WORK = {"cpu": 2e10, "cuda": 2e11}


class LayerSpectrum(TypedDict):
    """One layer: `sigma` descending, `trained` the half-open index range that trains, `note` why sigma is empty."""

    path: str
    tower: str
    shape: list[int]
    sigma: list[float]
    trained: list[int] | None
    method: str
    rank: int | None
    note: str | None


def layer_spectra(model: nn.Module, targets: Sequence[Target]) -> list[LayerSpectrum]:
    """Measure one layer per tower of the base model, which may be wrapped by an adapter.

    A convolution counts as the matrix (out, in * height * width). A matrix that would take more than a few seconds
    is skipped: its `sigma` is empty and its `note` gives the reason.
    """
    by_path = {target.path: target for target in targets}
    modules = dict(_matrices(model))
    tower_of = find_towers(base_model_of(model)).tower_of
    spectra = []
    for tower in TOWERS:
        paths = [path for path in modules if tower_of(path) == tower]
        adapted = [path for path in paths if path in by_path and by_path[path].method != "frozen"]
        if path := _representative(adapted or paths, tower):
            spectra.append(_measure(path, tower, modules[path], by_path.get(path)))
    return spectra


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path in the base model, layer) of every linear layer and ungrouped convolution."""
    for name, module in base_model_of(model).named_modules():
        if is_linear(module) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            yield _WRAPPER.sub("", name), module


def _representative(paths: Sequence[str], tower: str) -> str | None:
    """Return the layer to show: MLP output of the middle block, else the middle layer (vision), else the first."""
    outs = [path for path in paths if _MLP_OUT.search(path)]
    if outs:
        return outs[len(outs) // 2]
    return paths[len(paths) // 2 if tower == "vision" else 0] if paths else None


def _measure(path: str, tower: str, module: nn.Module, target: Target | None) -> LayerSpectrum:
    """Decompose one weight (out, in) in float32, unless it is too large or not loaded."""
    shape, method, rank = matrix_shape(module), target.method if target else "frozen", target.rank if target else None
    note = _reason_to_skip(shape, module.get_parameter("weight").device.type)
    sigma = [] if note else singular_values(read_matrix(module)).tolist()
    return LayerSpectrum(
        path=path,
        tower=tower,
        shape=list(shape),
        sigma=[float(f"{value:.6g}") for value in sigma],
        trained=None if target and target.has_fixed_A else _trained(method, rank, min(shape)),
        method=method,
        rank=rank,
        note=note,
    )


def _reason_to_skip(shape: tuple[int, int], device: str) -> str | None:
    if device == "meta":
        return "no singular values: the weights are not loaded"
    if shape[0] * shape[1] * min(shape) > _MAX_WORK.get(device, _MAX_WORK["cpu"]):
        return f"no singular values: {shape[0]} x {shape[1]} would take more than a few seconds on this {device}"
    return None


def _trained(method: str, rank: int | None, count: int) -> list[int] | None:
    """Return the initial index range of trained triplets among `count`, in descending order; None without a band."""
    if method == "full":
        return [0, count]
    if rank is None:
        return None
    bands = {"minor": [count - rank, count], "principal": [0, rank]}
    return bands.get(METHODS[method].part or "")
