"""Ranks found from singular values: a share of the energy, a threshold, or a budget of parameters shared out."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from milora_vl.policy.rules import PolicyError, SpectralRank
from milora_vl.weights.factor_cache import cached_singular_values
from milora_vl.weights.matrices import matrix_shape, read_matrix


def find_rank(rank: int | SpectralRank, module: nn.Module, cache: Path | None = None) -> int:
    """Return the rank itself, or the one the weight's spectrum gives; its upper bound on the meta device.

    For a budget see `share_budget`. `cache` is a folder that keeps singular values.
    """
    if isinstance(rank, int):
        return rank
    largest = _largest(rank, module)
    if _is_meta(module):
        return largest
    return max(min(_count_minor(_ascending(module, cache), rank), largest), min(rank.min, largest))


def share_budget(rank: SpectralRank, modules: Mapping[str, nn.Module], cache: Path | None = None) -> dict[str, int]:
    """Share `rank.budget` trainable parameters out among the modules; the ranks by path.

    A rank of one costs out + in. Components are taken in the order of sigma/sigma_max, the smallest first, so that all
    modules end at about the same threshold; `min` and `max` hold for each. Without weights all ranks are equal.
    Raises PolicyError for a budget that `min` alone exceeds.
    """
    assert rank.budget is not None
    cost = {path: sum(matrix_shape(module)) for path, module in modules.items()}
    largest = {path: _largest(rank, module) for path, module in modules.items()}
    ranks = {path: min(rank.min, largest[path]) for path in modules}
    left = rank.budget - sum(ranks[path] * cost[path] for path in modules)
    if left < 0:
        raise PolicyError(
            f"{rank.budget:,} parameters are too few, rank {rank.min} in every module takes {rank.budget - left:,}",
            code="policy-rank",
            where=".rank.budget",
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
            continue  # its later components cost as much
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
    """sigma/sigma_max, ascending; rounded, so that equal shares are equal on every machine and go by path."""
    sigma = _ascending(module, cache)
    return [float(f"{float(share):.5g}") for share in sigma / sigma[-1].clamp(min=1e-30)]


def _count_minor(ascending: Tensor, rank: SpectralRank) -> int:
    if rank.threshold is not None:
        return int((ascending <= rank.threshold * ascending[-1]).sum())
    energy = ascending.double().square().cumsum(0)
    return int((energy <= (rank.energy or 0.0) * energy[-1]).sum())
