"""Ranks that depend on singular values: a share of the energy, a threshold, or a shared budget of parameters."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from milora_vl.common.errors import Key
from milora_vl.core.policy.rules import PolicyError, SpectralRank
from milora_vl.core.weights.factor_cache import cached_singular_values
from milora_vl.core.weights.matrices import matrix_shape, read_matrix


def find_rank(rank: int | SpectralRank, module: nn.Module, cache: Path | None = None) -> int:
    """Return a fixed rank unchanged, and compute a spectral rank from the singular values of the weight.

    On the meta device, where weights have no values, this is the upper bound. `share_budget` computes budgets. `cache`
    is a folder for singular values.
    """
    if isinstance(rank, int):
        return rank
    largest = _largest(rank, module)
    if _is_meta(module):
        return largest
    return max(min(_count_minor(_ascending(module, cache), rank), largest), min(rank.min, largest))


def share_budget(
    rank: SpectralRank, modules: Mapping[str, nn.Module], cache: Path | None = None, *, fixed: Collection[str] = ()
) -> dict[str, int]:
    """Distribute `rank.budget` trainable parameters over the modules, and return the ranks by path.

    Each unit of rank costs out + in parameters, and out in the modules `fixed`, whose A does not train. Components are
    added in ascending order of sigma/sigma_max, so all modules end at about the same threshold. Every rank stays within
    `min` and `max`. On the meta device all ranks are equal. Raises PolicyError if the budget is smaller than `min`
    requires.
    """
    assert rank.budget is not None
    cost = {path: sum(matrix_shape(module)[: 1 if path in fixed else 2]) for path, module in modules.items()}
    largest = {path: _largest(rank, module) for path, module in modules.items()}
    ranks = {path: min(rank.min, largest[path]) for path in modules}
    left = rank.budget - sum(ranks[path] * cost[path] for path in modules)
    if left < 0:
        raise PolicyError(
            f"{rank.budget:,} parameters are too few: rank {rank.min} in every module needs {rank.budget - left:,}",
            code="policy-rank",
            where=Key.of("rank.budget"),
            hint="raise the budget, or select fewer modules",
        )
    if any(_is_meta(module) for module in modules.values()):
        equal = rank.budget // sum(cost.values())
        return {path: max(ranks[path], min(equal, largest[path])) for path in modules}
    shares = {path: _shares(module, cache) for path, module in modules.items()}
    queue = [(shares[path][ranks[path]], path) for path in modules if ranks[path] < largest[path]]
    heapq.heapify(queue)
    while queue:
        _, path = heapq.heappop(queue)
        if cost[path] > left:
            continue  # all further components of this module cost the same
        left -= cost[path]
        ranks[path] += 1
        if ranks[path] < largest[path]:
            heapq.heappush(queue, (shares[path][ranks[path]], path))
    return ranks


def _largest(rank: SpectralRank, module: nn.Module) -> int:
    return min(rank.max or min(matrix_shape(module)), min(matrix_shape(module)))


def _is_meta(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta


def _ascending(module: nn.Module, cache: Path | None) -> Tensor:
    return cached_singular_values(read_matrix(module), cache).flip(0)


def _shares(module: nn.Module, cache: Path | None) -> list[float]:
    """Return sigma/sigma_max, ascending, rounded to 5 digits: ties are then equal on every machine, and go by path."""
    sigma = _ascending(module, cache)
    return [float(f"{float(share):.5g}") for share in sigma / sigma[-1].clamp(min=1e-30)]


def _count_minor(ascending: Tensor, rank: SpectralRank) -> int:
    if rank.threshold is not None:
        return int((ascending <= rank.threshold * ascending[-1]).sum())
    energy = ascending.double().square().cumsum(0)
    return int((energy <= (rank.energy or 0.0) * energy[-1]).sum())
