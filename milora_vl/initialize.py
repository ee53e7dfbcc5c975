"""The initial factors of a whole model: one streaming pass over its targets, one weight in memory at a time.

Nothing of the model is changed here. Factors come rounded to the dtype of the base weight: the trained halves start at
exactly these values, so that step 0 stays exact (arXiv:2406.09044, section 3; scaling as in the official script).
Several processes share the work; all of them end with the same bits.

`start_olora` is the start of OLoRA (arXiv:2406.01775), a baseline: the first r columns of Q and rows of R of W = Q R.
It is PEFT's `olora_init` in the anchored form: the base weight stays as it is.
"""

from __future__ import annotations

import sys
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_data.errors import Problem, UserError
from milora_vl.policy.rules import FloorSigma, Sigma, Target
from milora_vl.svd import Factors, Part, decompose
from milora_vl.weights.distributed import assign_work, broadcast, from_first_rank, gather, rank_and_world_size
from milora_vl.weights.factor_cache import cache_key, cached_singular_values, read_factors, write_factors
from milora_vl.weights.fingerprint import Sketch, sketch
from milora_vl.weights.matrices import factor_dtype, read_matrix

Progress = bool | Literal["lines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What the initialisation did to one module. All sigma are those of the weight, before any floor.

    `sigma_top` is the largest of all, an estimate from below where `svd` is gram or gram64. `energy` is the share of
    ||W||_F^2 in the trained components, `excess` the certified bound of the error of their norm, `drift` how far the
    step-0 weight is from W, relative to ||W||_F: 0 by construction in the anchored form. `protected` is how many of the
    first singular directions the update stays out of.
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
    protected: int = 0

    def __str__(self) -> str:
        """One line for the screen."""
        return (
            f"{self.path}  {self.shape[0]}x{self.shape[1]}  {self.method} rank {self.rank}  "
            f"sigma {self.sigma_max:.3g}..{self.sigma_min:.3g} of {self.sigma_top:.3g}  energy {self.energy:.2%}  "
            f"excess {self.excess:.1e} ({self.svd})  {self.seconds:.2f} s"
            + (f"  top {self.protected} protected" if self.protected else "")
        )


@dataclass(frozen=True, slots=True)
class Initial:
    """The anchor of one target, A0 (r, in) and B0 (out, r), with the sketch of its base weight and the report."""

    A0: Tensor
    B0: Tensor
    sketch: Sketch
    report: LayerReport


class WeightError(UserError):
    """A weight that cannot be decomposed; `where` is the path of its module."""


def initialize(
    model: nn.Module, targets: Sequence[Target], *, cache_dir: str | Path | None = None, progress: Progress = False
) -> dict[str, Initial]:
    """Decompose the weights of `targets` that train a part of them; the result is by module path.

    Factors found in `cache_dir` are taken from there, others put there. `progress` shows a bar on stderr, "lines" a
    line per layer too. In a distributed run every process takes its share of the layers, under ZeRO-3 with one gathered
    at a time. Raises WeightError, in every process and with the module, for NaN and infinite values, empty and absent
    weights and ranks too large. Warns once, with the count, of singular values at zero: they start at a dead saddle.
    """
    wanted = [t for t in targets if t.part is not None]
    cache = None if cache_dir is None else Path(cache_dir)
    rank, _ = rank_and_world_size()
    made: dict[str, Initial] = {}
    shown = bool(progress) and rank == 0
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=len(wanted), desc="decomposing", unit="matrix", file=sys.stderr, disable=not shown, mininterval=interval
    ) as bar:
        for hand in assign_work([(_cost(target), target) for target in wanted]):
            for initial in _decompose_batch(model, hand, cache):
                made[initial.report.path] = initial
                if progress == "lines" and rank == 0:
                    bar.write(str(initial.report), file=sys.stderr)
            bar.update(len(hand))
    _warn_of_zeros(made, wanted)
    return {target.path: made[target.path] for target in wanted}


def _cost(target: Target) -> float:
    return float(target.shape[0] * target.shape[1] * min(target.shape))


def _decompose_batch(model: nn.Module, hand: Sequence[Target], cache: Path | None) -> list[Initial]:
    """Each process makes the factors of one target of the hand; all get those of all."""
    rank, _ = rank_and_world_size()
    own: Initial | None = None
    found: Sequence[Problem] = ()
    W = None
    for owner, target in enumerate(hand):
        # Under ZeRO-3 reading is gathering, which all do together.
        if owner == rank or is_deepspeed_zero3_enabled():
            gathered = read_matrix(model.get_submodule(target.path))
            W = gathered if owner == rank else W
    if W is not None:
        target = hand[rank]
        try:
            own = _initial(W, factor_dtype(model.get_submodule(target.path)), target, cache)
        except WeightError as error:
            found = error.problems
        except Exception as error:  # whatever it is: the other processes wait for this one
            if rank_and_world_size()[1] == 1:
                raise
            found = [Problem(f"{type(error).__name__}: {error}", "weight-decomposition", target.path)]
    told = gather((found, own and (own.sketch, own.report, own.A0.dtype, own.A0.shape, own.B0.shape)))
    for problems, _ in told:
        if problems:
            raise WeightError(problems=problems)
    return [
        _broadcast_initial(own if owner == rank else None, told[owner][1], model, owner) for owner in range(len(hand))
    ]


def _broadcast_initial(own: Initial | None, told: tuple, model: nn.Module, owner: int) -> Initial:
    seen, report, dtype, *shapes = told
    device = next(model.get_submodule(report.path).parameters()).device
    halves = (None, None) if own is None else (own.A0, own.B0)
    A0, B0 = (broadcast(half, shape, dtype, device, owner) for half, shape in zip(halves, shapes, strict=True))
    return Initial(A0, B0, seen, report)


def _initial(W: Tensor, dtype: torch.dtype, target: Target, cache: Path | None) -> Initial:
    start = time.perf_counter()
    assert target.rank is not None
    assert target.part is not None
    # A seed of its own for each module: equal shapes shall not draw equal components.
    seed = zlib.crc32(target.path.encode(), target.seed) if target.part == "random" else 0
    factors = cached_factors(W, target.rank, target.part, path=target.path, cache=cache, seed=seed)
    A0, B0 = _scaled(factors, W, target.sigma, target.scaling, cache)
    report = _report(factors, target, time.perf_counter() - start)
    return Initial(A0.to(dtype), B0.to(dtype), sketch(W), report)


def cached_factors(W: Tensor, rank: int, part: Part, *, path: str, cache: Path | None, seed: int = 0) -> Factors:
    """Return `rank` triplets of the weight W (out, in) of the module at `path`, from the cache where it has them.

    Raises WeightError, with the path, for a weight that cannot be decomposed; warns where the cache cannot be written.
    """
    if W.is_meta:
        raise WeightError(
            "the weight is on the meta device, it has no values",
            code="weight-on-meta",
            where=path,
            hint="load the model first",
        )
    key = cache_key(W, rank, part, seed) if cache is not None else ""
    stored = read_factors(cache, key) if cache is not None else None
    if stored is not None:
        return replace(stored, U=stored.U.to(W.device), S=stored.S.to(W.device), Vh=stored.Vh.to(W.device))
    try:
        factors = decompose(W, rank, part, generator=torch.Generator().manual_seed(seed))
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise WeightError(str(error), code="weight-decomposition", where=path) from error
    if cache is not None:
        try:
            write_factors(cache, key, factors)
        except OSError as error:
            warnings.warn(f"factors are not kept in {cache}: {error}", stacklevel=2)
    return factors


def _scaled(factors: Factors, W: Tensor, sigma: Sigma, scaling: float, cache: Path | None) -> tuple[Tensor, Tensor]:
    """A0 and B0; in the anchored form their scale is free, since B0 A0 is subtracted again."""
    if sigma == "none":
        return factors.Vh, factors.U
    if isinstance(sigma, FloorSigma):
        floor = float(sigma.floor * cached_singular_values(W, cache).median())
        factors = replace(factors, S=factors.S.clamp(min=floor))
    return factors.lora(scaling)


def _report(factors: Factors, target: Target, seconds: float) -> LayerReport:
    energy = float(factors.S.double().square().sum())
    return LayerReport(
        path=target.path,
        shape=(factors.U.shape[0], factors.Vh.shape[1]),
        tower=target.tower,
        method=target.method,
        rank=factors.S.numel(),
        sigma_min=float(factors.S[-1]),
        sigma_max=float(factors.S[0]),
        sigma_top=max(factors.sigma_max, float(factors.S[0])),
        energy=energy / factors.norm**2 if factors.norm > 0 else 0.0,
        excess=factors.excess,
        svd=factors.method,
        drift=0.0,
        seconds=seconds,
        protected=target.protect.top if target.protect else 0,
    )


def _warn_of_zeros(made: Mapping[str, Initial], targets: Sequence[Target]) -> None:
    """Tell of singular values that are zero within float32, after any floor: below the rounding of the largest."""
    dead = [
        target.path
        for target in targets
        if target.sigma != "none" and _weakest(made[target.path], target) <= 1e-7 * made[target.path].report.sigma_top
    ]
    if dead:
        warnings.warn(
            f"{len(dead):,} of {len(targets):,} adapters hold singular values at zero (first: {dead[0]}): A and B "
            "start at 0 there and learn slowly or not at all; set  sigma: {floor: 0.1}  in their rule (none, where "
            "even the median is zero), or a lower rank",
            stacklevel=3,
        )


def _weakest(initial: Initial, target: Target) -> float:
    """The smallest singular value the adapter starts with: rows of A0 are as long as the root of S over the scaling."""
    lengths = torch.linalg.vector_norm(initial.A0, dim=1, dtype=torch.float64)
    return float(lengths.min()) ** 2 * target.scaling


@torch.no_grad()
def start_olora(model: nn.Module, targets: Sequence[Target]) -> dict[str, Initial]:
    """Return A0 = R[:r] and B0 = Q[:, :r] of the targets whose method is olora, rounded to the base's dtype."""
    return {t.path: _olora_initial(model.get_submodule(t.path), t) for t in targets if t.method == "olora"}


def _olora_initial(module: nn.Module, target: Target) -> Initial:
    assert target.rank is not None
    start = time.perf_counter()
    W = read_matrix(module)
    Q, R = torch.linalg.qr(W.float())
    A0, B0 = R[: target.rank].contiguous(), Q[:, : target.rank].contiguous()
    sigma = target.scaling * torch.linalg.svdvals(A0)  # B0 has orthonormal columns
    norm = float(torch.linalg.vector_norm(W.float()))
    report = LayerReport(
        path=target.path,
        shape=(W.shape[0], W.shape[1]),
        tower=target.tower,
        method=target.method,
        rank=target.rank,
        sigma_min=float(sigma[-1]),
        sigma_max=float(sigma[0]),
        sigma_top=float(torch.linalg.matrix_norm(W.float(), ord=2)),
        energy=float(sigma.square().sum()) / norm**2 if norm > 0 else 0.0,
        excess=0.0,
        svd="qr",
        drift=0.0,
        seconds=time.perf_counter() - start,
    )
    dtype = factor_dtype(module)
    return Initial(from_first_rank(A0.to(dtype)), from_first_rank(B0.to(dtype)), sketch(W), report)
