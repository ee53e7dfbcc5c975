"""A fixed A: the input factor of an adapter is chosen once, off the protected inputs, and only B trains, from zero.

y = W x + s B A x with A (r, in) as a buffer of PEFT's own layer. `Fixed` in `studies/study.py` says how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from milora_vl.core.adapter.fixed_a import fix_A
from milora_vl.core.adapter.install import lora_layer
from milora_vl.core.calibration.activations import energy_limits
from milora_vl.core.calibration.positions import positions_of
from milora_vl.core.init.initialize import cached_factors
from milora_vl.core.policy import Target
from milora_vl.core.policy.towers import image_token_of
from milora_vl.core.weights.matrices import read_matrix
from studies.study import Fixed
from studies.task import Task

LENGTH = 3**-0.5  # of the rows: the mean length of the rows of PEFT's random A
OTHER_ORDER = 1000  # added to the seed: the gradient's batches come in another order than the training's
EXTRA = 8  # rows of a sketch beyond the rank
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The eigenvalues (in,) of C = E[x x'], largest first, and its eigenvectors (in, in) in columns."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, C: Tensor) -> Spectrum:
        """Decompose C (in, in)."""
        values, vectors = (half.flip(-1) for half in torch.linalg.eigh(C))
        return cls(values.clamp(min=0), vectors.contiguous())

    def count(self, share: float) -> int:
        """Return the smallest number of eigenvectors that hold `share` of the trace."""
        held = self.values.double().cumsum(0)
        return min(int((held < share * held[-1]).sum()) + 1, len(held))

    def cut(self, rows: Tensor, fixed: Fixed) -> Tensor:
        """Return rows (n, in) with the protected directions removed, or damped by a soft cut."""
        if fixed.inputs is None:
            return rows
        count = self.count(fixed.inputs)
        if fixed.soft is not None:
            return (rows @ self.vectors) / (1 + self.values / (fixed.soft * self.values[count - 1])) @ self.vectors.T
        V = self.vectors[:, :count]
        rows = rows - (rows @ V) @ V.T
        return rows - (rows @ V) @ V.T  # again, for what rounding leaves


@torch.no_grad()
def input_spectra(
    model: nn.Module, paths: Sequence[str], batches: Callable[[], Sequence[Mapping[str, Any]]], cache: Path
) -> dict[str, Spectrum]:
    """Return the spectrum of the inputs of each module; modules that read one tensor share it. Stored in `cache`.

    `batches` is called if it is not stored: the base may have to write them first.
    """
    file = cache / f"inputs-{hashlib.sha256(' '.join(paths).encode()).hexdigest()[:12]}.pt"
    if not file.is_file():
        sums, owner = _second_moments(model, paths, batches())
        spectra = {path: Spectrum.of(C) for path, C in sums.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(({path: (s.values, s.vectors) for path, s in spectra.items()}, owner), file)
    stored, owner = torch.load(file, mmap=True)
    return {path: Spectrum(*stored[owner[path]]) for path in paths}


def _second_moments(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return C of each distinct input by the first module that reads it, and that module for every module.

    Positions weigh as in `milora_vl.core.calibration`, but no batch is held out.
    """
    sums: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    weights: Tensor | None = None
    last: list[Any] = [None, ""]  # the tensor that the last module read, and the first module that read it

    def hook_of(path: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if x is not last[0]:
                last[:] = [x, path]
            if owner.setdefault(path, last[1]) != path:
                return
            rows = x.reshape(-1, x.shape[-1]).float()
            given = torch.ones(len(rows)) if weights is None or weights.numel() != len(rows) else weights.reshape(-1)
            rows, given = rows[given > 0], given[given > 0]
            scaled = rows * (given * energy_limits(rows)).sqrt()[:, None]
            sums[path] = sums.get(path, 0) + scaled.T @ scaled

        return add

    handles = [model.get_submodule(path).register_forward_pre_hook(hook_of(path)) for path in paths]
    for batch, positions in zip(batches, positions_of(batches, image_token_of(model)), strict=True):
        weights = positions
        model(
            **{name: value.to(_dtype(model)) if value.is_floating_point() else value for name, value in batch.items()}
        )
        last[0] = None
    for handle in handles:
        handle.remove()
    return sums, owner


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point()).dtype


def gradients(
    model: nn.Module, ranks: Mapping[str, int], loss: Loss, batches: Iterable[Any], sketch_seed: int | None
) -> dict[str, Tensor]:
    """Return the summed gradient (out, in) of each weight, or random combinations (r + 8, in) of its rows.

    The sum over tokens g x' of the layer's output gradients g and inputs x; a sketch multiplies g with a random matrix
    first. No gradient of a weight is computed. Freezes the parameters of `model`.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(sketch_seed or 0)
    found: dict[str, Tensor] = {}
    handles = []
    for path, rank in ranks.items():
        module = model.get_submodule(path)
        out = read_matrix(module).shape[0]
        mix = None if sketch_seed is None else torch.randn(out, rank + EXTRA, generator=generator)

        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor, path: str = path, mix: Any = mix) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()

            def add(g: Tensor) -> None:
                g = g.reshape(-1, g.shape[-1]).float()
                found[path] = found.get(path, 0) + (g if mix is None else g @ mix).T @ x

            if not output.requires_grad:  # nothing before the first layer trains
                output.requires_grad_()
            output.register_hook(add)

        handles.append(module.register_forward_hook(see))
    for batch in batches:
        loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    return found


def first_directions_of(G: Tensor, rank: int) -> Tensor:
    """Return the first right singular vectors (rank, in) of G (n, in)."""
    if min(G.shape) <= rank + EXTRA:
        return torch.linalg.svd(G, full_matrices=False).Vh[:rank]
    return torch.svd_lowrank(G, q=rank + EXTRA, niter=4)[2].T[:rank]


def rows_of(
    fixed: Fixed, W: Tensor, rank: int, spectrum: Spectrum, G: Tensor | None, *, path: str, cache: Path
) -> Tensor:
    """Return A (rank, in) in float32 for the weight W (out, in). Uses torch's global generator for `random`."""
    if fixed.start in ("minor", "principal"):
        factors = cached_factors(W, rank, fixed.start, path=path, cache=cache)  # type: ignore[arg-type]
        rows = factors.Vh if fixed.rows == "equal" else factors.S.sqrt()[:, None] * factors.Vh
    elif fixed.start == "random":
        rows = torch.randn(rank, W.shape[1]) * (LENGTH / W.shape[1] ** 0.5)
    elif fixed.start == "unused":
        rows = spectrum.vectors[:, -rank:].T
    else:
        assert G is not None
        rows = _from_gradient(fixed, W, rank, spectrum, G, path=path, cache=cache)
    rows = spectrum.cut(rows.float(), fixed) if fixed.soft is None or not fixed.needs_gradient else rows
    return LENGTH * nn.functional.normalize(rows, dim=1) if fixed.rows == "equal" else rows


def _from_gradient(
    fixed: Fixed, W: Tensor, rank: int, spectrum: Spectrum, G: Tensor, *, path: str, cache: Path
) -> Tensor:
    if fixed.start == "gradient-minor":
        first = cached_factors(W, min(W.shape) // 2, "principal", path=path, cache=cache).Vh
        G = G - (G @ first.T) @ first
    G = spectrum.cut(G, fixed)
    if fixed.start != "generalized":
        return first_directions_of(G, rank)
    at_cut = spectrum.values[spectrum.count(fixed.inputs or 0.0) - 1]
    scales = (spectrum.values + at_cut).rsqrt()  # (C + lambda_k I)^-1/2, in the basis of C's eigenvectors
    directions = first_directions_of((G @ spectrum.vectors) * scales, rank)
    return (directions * scales) @ spectrum.vectors.T


def starts(
    model: nn.Module, targets: Sequence[Target], fixed: Fixed, task: Task, *, batch_size: int, seed: int, cache: Path
) -> dict[str, Tensor]:
    """Return A (rank, in) for each target with a rank. `seed` orders the batches of the gradient; `cache` stores C."""
    ranks = {target.path: target.rank for target in targets if target.rank is not None}
    spectra = input_spectra(model, list(ranks), task.calibration, cache)
    found: Mapping[str, Tensor] = {}
    if fixed.needs_gradient:
        batches = islice(task.batches(batch_size, OTHER_ORDER + seed), fixed.batches)
        found = gradients(model, ranks, task.loss, batches, seed if fixed.sketch else None)
    return {
        path: rows_of(
            fixed, read_matrix(model.get_submodule(path)), rank, spectra[path], found.get(path), path=path, cache=cache
        )
        for path, rank in ranks.items()
    }


def install(model: Any, rows: Mapping[str, Tensor], *, trains: bool) -> None:
    """Put A into PEFT's layers, as a buffer unless it trains."""
    for path, A in rows.items():
        layer = lora_layer(model, path)
        if trains:
            layer.lora_A["default"].get_parameter("weight").data.copy_(A)
        else:
            fix_A(layer, "default", A)
