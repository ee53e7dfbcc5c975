"""The initial factors of a whole model: one streaming pass over its targets, one weight in memory at a time.

Nothing of the model is changed here. Factors come rounded to the dtype of the base weight: the trained halves start at
exactly these values, so that step 0 stays exact (arXiv:2406.09044, section 3; scaling as in the official script).
"""

from __future__ import annotations

import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from milora_vl.lora.factor_cache import cache_key, read_factors, write_factors
from milora_vl.lora.fingerprint import Sketch, sketch
from milora_vl.lora.weights import factor_dtype, read_matrix
from milora_vl.policies.rules import FloorSigma, Sigma, Target
from milora_vl.svd import Factors, decompose


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


class WeightError(ValueError):
    """A weight that cannot be decomposed: the message names the module and the numbers."""


def initialize(
    model: nn.Module, targets: Sequence[Target], *, cache_dir: str | Path | None = None, progress: bool = False
) -> dict[str, Initial]:
    """Decompose the weights of `targets` that train a part of them; the result is by module path.

    Factors found in `cache_dir` are taken from there, others put there. `progress` shows a bar on stderr.
    Raises ValueError, with the module, for NaN and infinite values, empty weights and ranks too large. Warns once,
    with the count, of singular values at zero: they start at a dead saddle.
    """
    wanted = [t for t in targets if t.part is not None]
    bar = tqdm(wanted, desc="decomposing", unit="matrix", file=sys.stderr, disable=not progress)
    cache = None if cache_dir is None else Path(cache_dir)
    made = {target.path: _initial(model.get_submodule(target.path), target, cache) for target in bar}
    _warn_of_zeros([initial.report for initial in made.values()], wanted)
    return made


def _initial(module: nn.Module, target: Target, cache: Path | None) -> Initial:
    start = time.perf_counter()
    W = read_matrix(module)
    factors = _factors(W, target, cache)
    dtype = factor_dtype(module)
    A0, B0 = (from_first_rank(factor.to(dtype)) for factor in _scaled(factors, target.sigma, target.scaling))
    report = _report(factors, target, time.perf_counter() - start)
    return Initial(A0, B0, sketch(W), report)


def _factors(W: Tensor, target: Target, cache: Path | None) -> Factors:
    assert target.rank is not None
    assert target.part is not None
    # A seed of its own for each module: equal shapes shall not draw equal components.
    seed = zlib.crc32(target.path.encode()) if target.part == "random" else 0
    key = cache_key(W, target.rank, target.part, seed) if cache is not None else ""
    stored = read_factors(cache, key) if cache is not None else None
    if stored is not None:
        return replace(stored, U=stored.U.to(W.device), S=stored.S.to(W.device), Vh=stored.Vh.to(W.device))
    try:
        factors = decompose(W, target.rank, target.part, generator=torch.Generator().manual_seed(seed))
    except ValueError as error:
        raise WeightError(f"{target.path}: {error}") from error
    if cache is not None:
        write_factors(cache, key, factors)
    return factors


def from_first_rank(tensor: Tensor) -> Tensor:
    """Return the tensor as rank 0 has it: signs and nearly equal components may differ between machines."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    shared = tensor.to(torch.cuda.current_device()) if dist.get_backend() == "nccl" else tensor
    dist.broadcast(shared, src=0)
    return shared.to(tensor.device)


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


def _warn_of_zeros(reports: Sequence[LayerReport], targets: Sequence[Target]) -> None:
    kept = {t.path for t in targets if t.sigma == "keep"}
    # Zero within float32: below the rounding of the largest singular value.
    dead = [r for r in reports if r.path in kept and r.sigma_min <= 1e-7 * r.sigma_top]
    if dead:
        warnings.warn(
            f"{len(dead):,} of {len(kept):,} adapters hold singular values at zero (first: {dead[0].path}): A and B "
            "start at 0 there and learn slowly or not at all; set  sigma: {floor: 0.1}  in their rule, or a lower rank",
            stacklevel=3,
        )
