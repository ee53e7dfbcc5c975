"""Compute the initial factors A0 and B0 of all targets of a model, on all processes (arXiv:2406.09044, section 3).

For W = U S V' and the r chosen triplets U_r (out, r), S_r (r,), V_r (in, r), with s = alpha / r:

    B0 = U_r sqrt(S_r / s)      (out, r)
    A0 = sqrt(S_r / s) V_r'     (r, in)          so that s B0 A0 = U_r S_r V_r'

The square root balances both factors, as in the paper's official script. Division by s makes the product independent of
alpha, so W - s B0 A0 is W without its r components.

One weight is in memory at a time, and the model is not changed. Factors are rounded to the dtype of the weight. With
several processes each one decomposes a share of the weights, and all of them get identical bits.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from milora_vl.common.errors import UserError
from milora_vl.common.progress import progress_bar
from milora_vl.core.calibration import FACTORS
from milora_vl.core.policy.rules import Target
from milora_vl.core.svd import Factors
from milora_vl.core.weights.distributed import broadcast, gather_objects, rank_and_world_size
from milora_vl.core.weights.matrices import Fingerprint, factor_dtype, fingerprint, for_each_weight
from milora_vl.core.weights.tensor_files import cached_factors


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """The result of initializing one module. All sigma belong to the weight W.

    - `sigma_min`, `sigma_max`: the smallest and largest singular value of the trained components.
    - `sigma_top`: the largest singular value of W; a lower estimate if `svd` is gram or gram64.
    - `energy`: the share of ||W||_F^2 in the trained components.
    - `excess`: a certified bound on the error of their norm, see `Factors`.
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


@dataclass(frozen=True, slots=True)
class Initial:
    """The initial factors A0 (r, in) and B0 (out, r) of a target, the fingerprint of its base weight and its report."""

    A0: Tensor
    B0: Tensor
    fingerprint: Fingerprint
    report: LayerReport


class WeightError(UserError):
    """A weight that cannot be decomposed. `where` is the path of its module."""


def initialize(
    model: nn.Module, targets: Sequence[Target], *, cache_dir: str | Path | None = None, progress: bool = False
) -> dict[str, Initial]:
    """Return the initial factors of all targets that keep them as an anchor, by module path.

    Factors are read from `cache_dir` and written to it. `progress` shows a progress bar on stderr. In a
    distributed run each process decomposes a share of the layers; ZeRO-3 gathers one layer at a time.

    Raises WeightError, in every process and with the module, for NaN and infinite values, for empty and missing weights
    and for ranks that are too large. Warns about singular values at zero.

    >>> from milora_vl.core.policy import Policy
    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    >>> targets = Policy.parse("[{modules: language, method: milora, rank: 2, protect: 0}]").resolve(model)
    >>> initial = initialize(model, targets)["0"]
    >>> initial.A0.shape, initial.B0.shape
    (torch.Size([2, 4]), torch.Size([4, 2]))
    >>> torch.allclose(initial.B0 @ initial.A0, torch.diag(torch.tensor([0.0, 0.0, 2.0, 1.0])), atol=1e-6)
    True
    """
    wanted = [t for t in targets if t.has_anchor]
    cache = None if cache_dir is None else Path(cache_dir)
    rank, processes = rank_and_world_size()
    # Processes go in step, so pieces of similar cost belong together.
    order = sorted(wanted, key=lambda t: -t.shape[0] * t.shape[1] * min(t.shape))
    shares = [order[first::processes] for first in range(processes)]
    by_path = {target.path: target for target in wanted}
    with progress_bar(FACTORS, len(shares[rank]), "matrices", is_shown=bool(progress and wanted) and rank == 0) as bar:

        def make(path: str, W: Tensor) -> Initial:
            initial = _initial(W, factor_dtype(model.get_submodule(path)), by_path[path], cache)
            bar.update()
            return initial

        mine = for_each_weight(model, [[target.path for target in share] for share in shares], make)
    about = {path: (one.fingerprint, one.report, one.A0.dtype) for path, one in mine.items()}
    found = {path: (owner, *one) for owner, part in enumerate(gather_objects(about)) for path, one in part.items()}
    initial: dict[str, Initial] = {}
    for t in wanted:
        owner, of_base, report, dtype = found[t.path]
        device, (out, inn) = next(model.get_submodule(t.path).parameters()).device, report.shape
        own = mine.get(t.path)
        A0 = broadcast(None if own is None else own.A0, (report.rank, inn), dtype, device, owner)
        B0 = broadcast(None if own is None else own.B0, (out, report.rank), dtype, device, owner)
        initial[t.path] = Initial(A0, B0, of_base, report)
    # Row i of A0 and column i of B0 have the length sqrt(S_i / s). Where both are 0, so are their gradients.
    dead = [path for path, one in initial.items() if one.report.sigma_min <= 1e-7 * one.report.sigma_top]
    if dead and rank == 0:
        warnings.warn(
            f"{len(dead):,} of {len(initial):,} adapters hold singular values at zero (first: {dead[0]}), which learn "
            "slowly or not at all. Remove  protect: 0,  or set  method: lora  for them.",
            stacklevel=3,
        )
    return initial


def _initial(W: Tensor, dtype: torch.dtype, target: Target, cache: Path | None) -> Initial:
    """Raises WeightError for a weight that cannot be decomposed. Warns if the cache cannot be written."""
    assert target.rank is not None
    assert target.part is not None
    try:
        factors = cached_factors(W, target.rank, target.part, cache, seed=seed_of(target))
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise WeightError(str(error), where=target.path) from error
    A0, B0 = factors.lora(target.scaling)  # any scale is allowed, because B0 A0 is subtracted
    return Initial(A0.to(dtype), B0.to(dtype), fingerprint(W), _report(factors, target))


def seed_of(target: Target) -> int:
    """Return the seed of a random part. Modules of equal shape must not draw the same positions."""
    return zlib.crc32(target.path.encode(), target.seed) if target.part == "random" else 0


def _report(factors: Factors, target: Target) -> LayerReport:
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
    )
