"""The singular values of one layer per tower, with the band that trains: the picture that explains MiLoRA.

Measured on the base model's weights; written to `spectrum.json` in the run folder, drawn by `reporting/plots.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypedDict

from torch import nn

from milora_vl.policy import Target
from milora_vl.svd import singular_values
from milora_vl.towers import TOWERS, find_towers
from milora_vl.weights.matrices import is_linear, matrix_shape, read_matrix

# The matrix that leads out of a block's MLP, in the names of Llama, GPT-2, CLIP and their kin.
_MLP_OUT = re.compile(r"(mlp|feed_forward|ffn|output)\.(down_proj|c_proj|fc2|w2|dense|dense_4h_to_h)$")
# PEFT keeps the base layer inside its wrappers; its own layers beside it have paths that no target has.
_WRAPPER = re.compile(r"\.(base_layer|original_module)\b")
# svdvals of an (m, n) matrix takes about m * n * min(m, n) / 7e9 seconds on one CPU core.
_MAX_WORK = {"cpu": 2e10, "cuda": 2e11}


class LayerSpectrum(TypedDict):
    """One layer: `sigma` descending, `trained` the half-open index range that trains, `note` why sigma is absent."""

    path: str
    tower: str
    shape: list[int]
    sigma: list[float]
    trained: list[int] | None
    method: str
    rank: int | None
    note: str | None


def layer_spectra(model: nn.Module, targets: Sequence[Target]) -> list[LayerSpectrum]:
    """Measure one layer per tower of the base model, whether or not it has been wrapped (in the anchored form).

    A convolution counts as the matrix (out, in * height * width). A matrix that would take more than a few seconds
    is not decomposed: its `sigma` is empty and its `note` says so. Under the residual form call this before
    `apply_milora`, which takes the trained band out of the weights.
    """
    by_path = {target.path: target for target in targets}
    modules = dict(_matrices(model))
    tower_of = find_towers(_base(model)).tower_of
    spectra = []
    for tower in TOWERS:
        paths = [path for path in modules if tower_of(path) == tower]
        adapted = [path for path in paths if path in by_path and by_path[path].method != "frozen"]
        if path := _representative(adapted or paths, tower):
            spectra.append(_measure(path, tower, modules[path], by_path.get(path)))
    return spectra


def _base(model: nn.Module) -> nn.Module:
    """The model under a PEFT wrapper, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path in the base model, layer) of every linear layer and ungrouped convolution."""
    for name, module in _base(model).named_modules():
        if is_linear(module) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            yield _WRAPPER.sub("", name), module


def _representative(paths: Sequence[str], tower: str) -> str | None:
    """The layer to show: out of the middle block's MLP, else the middle one of a vision tower, else the first."""
    outs = [path for path in paths if _MLP_OUT.search(path)]
    if outs:
        return outs[len(outs) // 2]
    return paths[len(paths) // 2 if tower == "vision" else 0] if paths else None


def _measure(path: str, tower: str, module: nn.Module, target: Target | None) -> LayerSpectrum:
    """Decompose one weight (out, in) in float32, unless it is too large or not there."""
    shape, method, rank = matrix_shape(module), target.method if target else "frozen", target.rank if target else None
    note = _reason_to_skip(shape, module.get_parameter("weight").device.type)
    sigma = [] if note else singular_values(read_matrix(module)).tolist()
    return LayerSpectrum(
        path=path,
        tower=tower,
        shape=list(shape),
        sigma=[float(f"{value:.6g}") for value in sigma],
        trained=_trained(method, rank, min(shape)),
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
    """Which of `count` singular triplets, in descending order, train at first; None where they are no band."""
    if method == "full":
        return [0, count]
    if method == "milora" and rank:
        return [count - rank, count]
    return [0, rank] if method == "pissa" and rank else None
