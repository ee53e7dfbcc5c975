"""The initial factors of a whole model: one streaming pass over its targets, one weight in memory at a time.

Nothing of the model is changed here. Factors come rounded to the dtype of the base weight: the trained halves start at
exactly these values, so that step 0 stays exact (arXiv:2406.09044, section 3; scaling as in the official script).
"""

from __future__ import annotations

import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from milora_vl.fingerprint import Sketch, sketch
from milora_vl.policy import FloorSigma, Sigma, Target
from milora_vl.svd import Factors, decompose
from milora_vl.weights import factor_dtype, read_matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What the initialisation did to one module. All sigma are those of the weight, before any floor.

    `energy` is the share of ||W||_F^2 in the trained components, `drift` how far the step-0 weight is from W,
    relative to ||W||_F: 0 by construction in the anchored form.
    """

    path: str
    shape: tuple[int, int]
    tower: str | None
    method: str
    rank: int
    sigma_min: float
    sigma_max: float
    sigma_top: float
    energy: float
    excess: float
    svd: str
    drift: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Initial:
    """The anchor of one target, A0 (r, in) and B0 (out, r), with the sketch of its base weight and the report."""

    A0: Tensor
    B0: Tensor
    sketch: Sketch
    report: LayerReport


def initialize(model: nn.Module, targets: Sequence[Target], *, progress: bool = False) -> dict[str, Initial]:
    """Decompose the weights of `targets` that train a part of them; the result is by module path.

    `progress` shows a bar on stderr. Raises ValueError, with the module, for NaN and infinite values, empty weights
    and ranks too large. Warns once, with the count, of singular values at zero: they start at a dead saddle.
    """
    wanted = [t for t in targets if t.part is not None]
    bar = tqdm(wanted, desc="decomposing", unit="matrix", file=sys.stderr, disable=not progress)
    made = {target.path: _initial(model.get_submodule(target.path), target) for target in bar}
    _warn_of_zeros(made.values(), wanted)
    return made


def _initial(module: nn.Module, target: Target) -> Initial:
    start = time.perf_counter()
    W = read_matrix(module)
    assert target.rank is not None
    assert target.part is not None
    generator = torch.Generator().manual_seed(zlib.crc32(target.path.encode()))
    try:
        factors = decompose(W, target.rank, target.part, generator=generator)
    except ValueError as error:
        raise ValueError(f"{target.path}: {error}") from error
    dtype = factor_dtype(module)
    A0, B0 = _scaled(factors, target.sigma, target.scaling)
    report = _report(factors, target, time.perf_counter() - start)
    return Initial(A0.to(dtype), B0.to(dtype), sketch(W), report)


def _scaled(factors: Factors, sigma: Sigma, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 and B0; in the anchored form their scale is free, since B0 A0 is subtracted again."""
    if sigma == "none":
        return factors.Vh, factors.U
    if isinstance(sigma, FloorSigma):
        floor = float(sigma.floor * factors.spectrum.median())
        factors = replace(factors, S=factors.S.clamp(min=floor))
    return factors.lora(scaling)


def _report(factors: Factors, target: Target, seconds: float) -> LayerReport:
    energy = factors.spectrum.double().square()
    total = float(energy.sum())
    return LayerReport(
        path=target.path,
        shape=(factors.U.shape[0], factors.Vh.shape[1]),
        tower=target.tower,
        method=target.method,
        rank=factors.S.numel(),
        sigma_min=float(factors.S[-1]),
        sigma_max=float(factors.S[0]),
        sigma_top=float(factors.spectrum[0]),
        energy=float(energy[factors.index].sum()) / total if total > 0 else 0.0,
        excess=factors.excess,
        svd=factors.method,
        drift=0.0,
        seconds=seconds,
    )


def _warn_of_zeros(made: Iterator[Initial] | Sequence[Initial], targets: Sequence[Target]) -> None:
    kept = {t.path for t in targets if t.sigma == "keep"}
    # Zero within float32: below the rounding of the largest singular value.
    dead = [m.report for m in made if m.report.path in kept and m.report.sigma_min <= 1e-7 * m.report.sigma_top]
    if dead:
        warnings.warn(
            f"{len(dead):,} of {len(kept):,} adapters hold singular values at zero (first: {dead[0].path}): A and B "
            "start at 0 there and learn slowly or not at all; set  sigma: {floor: 0.1}  in their rule, or a lower rank",
            stacklevel=3,
        )
