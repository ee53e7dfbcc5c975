"""Ranks from singular values: a share of the energy, a threshold, or a shared budget of parameters.

A policy has numbers. `with_ranks` reads the weights of a model and returns a policy with the numbers that they give.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import Field, model_validator
from torch import Tensor, nn

from milora_vl.common.errors import Key
from milora_vl.common.progress import progress_bar
from milora_vl.core.policy.methods import METHODS
from milora_vl.core.policy.policy import Policy
from milora_vl.core.policy.rules import Number, PolicyError, Rule, RulePart, Target
from milora_vl.core.weights.factor_cache import cached_singular_values


class SpectralRank(RulePart):
    """How the rank of a weight follows from its singular values, within min..max. Exactly one field of three is set.

    - `energy`: the largest r whose minor components hold at most this share of ||W||_F^2.
    - `threshold`: the number of components with sigma at most this share of the largest sigma.
    - `budget`: the number of trainable parameters of all modules together. Components with the smallest sigma/sigma_max
      come first, so all modules end at about the same threshold.
    """

    energy: Number | None = Field(default=None, gt=0, le=1, description="a share above 0, at most 1")
    threshold: Number | None = Field(default=None, gt=0, le=1, description="a share above 0, at most 1")
    budget: int | None = Field(default=None, gt=0, description="a number of parameters")
    min: int = Field(default=1, gt=0, description="a positive integer")
    max: int | None = Field(default=None, gt=0, description="a positive integer")

    @model_validator(mode="after")
    def _has_one_measure(self) -> SpectralRank:
        count = [self.energy, self.threshold, self.budget].count(None)
        if count != 2:
            raise ValueError(f"expected exactly one of energy, threshold and budget, got {3 - count}")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"expected min <= max, got min {self.min}, max {self.max}")
        return self

    def within(self, rank: int, target: Target) -> int:
        """Return the rank within min, max and the size of the target's matrix."""
        largest = min(self.max or min(target.shape), *target.shape)
        return max(min(rank, largest), min(self.min, largest))


def with_ranks(
    policy: Policy,
    model: nn.Module,
    rank: SpectralRank,
    weight: Callable[[str], Tensor],
    *,
    cache: Path | None = None,
    is_shown: bool = False,
) -> Policy:
    """Return the policy with one more rule for each module that has an adapter: its rank. Scales alpha/rank stay.

    `model` may be on the meta device: `weight` returns the matrix (out, in) at a path. `cache` is a folder for singular
    values, `is_shown` shows a progress bar. Raises PolicyError for a policy that does not fit the model, and for a
    budget that is too small.

    >>> from milora_vl.core.weights.matrices import read_matrix
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> model[0].weight.data = Tensor([4.0, 3.0, 2.0, 1.0]).diag()
    >>> policy = Policy.parse("- {modules: language, method: milora, rank: 1}")
    >>> found = with_ranks(policy, model, SpectralRank(threshold=0.5), lambda path: read_matrix(model[0]))
    >>> found.to_list()[1:]
    [{'modules': '0', 'rank': 2}]
    """
    adapters = [target for target in _any_rank(policy).resolve(model) if target.rank is not None]
    if not adapters:
        raise PolicyError(
            "no rule makes an adapter",
            code="policy-no-adapter-rule",
            where=Key.of("policy"),
            hint="for example  [{modules: language, method: milora, rank: 64}]",
        )
    spectra: dict[str, Tensor] = {}
    with progress_bar("reading spectra", len(adapters), "matrices", is_shown=is_shown) as bar:
        for target in adapters:
            spectra[target.path] = cached_singular_values(weight(target.path), cache).flip(0)
            bar.update()
    if rank.budget is None:
        ranks = {target.path: rank.within(_count_minor(spectra[target.path], rank), target) for target in adapters}
    else:
        ranks = _share_budget(rank, rank.budget, adapters, spectra)
    return Policy((*policy.rules, *(Rule(modules=path, rank=number) for path, number in ranks.items())))


def _any_rank(policy: Policy) -> Policy:
    """Return the policy with rank 1, which fits every matrix."""

    def with_rank(rule: Rule) -> Rule:
        takes_rank = rule.rank is not None or (rule.method is not None and "rank" in METHODS[rule.method].fields)
        return rule.model_copy(update={"rank": 1}) if takes_rank else rule

    return Policy(tuple(map(with_rank, policy.rules)))


def _share_budget(
    rank: SpectralRank, budget: int, adapters: Sequence[Target], spectra: Mapping[str, Tensor]
) -> dict[str, int]:
    """Distribute the trainable parameters over the adapters, and return the ranks by path.

    Each unit of rank costs out + in parameters, and out where A is fixed. Components are added in ascending order of
    sigma/sigma_max. Raises PolicyError if the budget is smaller than `min` requires.
    """
    cost = {target.path: sum(target.shape[: 1 if target.has_fixed_A else 2]) for target in adapters}
    largest = {target.path: rank.within(max(target.shape), target) for target in adapters}
    ranks = {target.path: rank.within(0, target) for target in adapters}
    left = budget - sum(ranks[path] * cost[path] for path in ranks)
    if left < 0:
        raise PolicyError(
            f"{budget:,} parameters are too few: rank {rank.min} in every module needs {budget - left:,}",
            code="policy-rank",
            where=Key.of("budget"),
            hint="raise the budget, or select fewer modules",
        )
    shares = {path: _shares(spectrum) for path, spectrum in spectra.items()}
    queue = [(shares[path][ranks[path]], path) for path in ranks if ranks[path] < largest[path]]
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


def _shares(ascending: Tensor) -> list[float]:
    """Return sigma/sigma_max, ascending, rounded to 5 digits: ties are then equal on every machine, and go by path."""
    return [float(f"{float(share):.5g}") for share in ascending / ascending[-1].clamp(min=1e-30)]


def _count_minor(ascending: Tensor, rank: SpectralRank) -> int:
    if rank.threshold is not None:
        return int((ascending <= rank.threshold * ascending[-1]).sum())
    energy = ascending.double().square().cumsum(0)
    return int((energy <= (rank.energy or 0.0) * energy[-1]).sum())
