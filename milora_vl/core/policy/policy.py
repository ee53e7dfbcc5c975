"""`Policy`, an ordered list of rules, read from YAML. A later rule overrides the fields that it sets.

    - {modules: language, method: milora, rank: 64}
    - {modules: "language.layers[0-3].mlp", rank: 128}      # the first four MLPs: milora, rank 128
    - {modules: projector, method: full, learning_rate: 2.0e-5}

`Policy.parse` reads the rules, `Policy.resolve` applies them to a model. Both collect all problems before they raise.

>>> from torch import nn
>>> policy = Policy.parse("[{modules: language, method: milora, rank: 2}, {modules: '0', rank: 4}]")
>>> [(t.path, t.method, t.rank) for t in policy.resolve(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)))]
[('0', 'milora', 4), ('1', 'milora', 2)]
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from milora_vl.common.errors import Key, Problem
from milora_vl.common.progress import progress_bar
from milora_vl.common.yaml_text import YamlTextError, parse_yaml
from milora_vl.core.policy.rules import METHODS, Number, PolicyError, Rule, RulePart, Target

if TYPE_CHECKING:  # torch takes a second, and reading rules needs none of it
    from torch import Tensor, nn


_EXAMPLE = "for example  [{modules: language, method: milora, rank: 64}]"


@dataclass(frozen=True, slots=True)
class Policy:
    """An ordered list of rules. Modules that no rule matches are frozen."""

    rules: tuple[Rule, ...]

    @staticmethod
    def parse(source: str | Path | Sequence[Mapping[str, Any] | Rule] | Policy) -> Policy:
        """Return the policy in a YAML text, in a YAML file (*.yaml, *.yml) or in a list of mappings.

        Raises PolicyError with all problems: unknown keys, wrong types, values out of range.

        >>> Policy.parse("- {modules: language, method: milora, rank: 8}").rules[0].rank
        8
        """
        if isinstance(source, Policy):
            return source
        items = _load_yaml(_text_of(source)) if isinstance(source, str | Path) else source
        if isinstance(items, str | Mapping) or not isinstance(items, Sequence) or not items:
            found = "an empty list" if items == [] else type(items).__name__
            raise PolicyError(
                f"expected a list of rules, got {found}", code="policy-value", where=Key.of("policy"), hint=_EXAMPLE
            )
        rules: list[Rule] = []
        problems: list[Problem] = []
        for number, item in enumerate(items):
            try:
                if not isinstance(item, Rule | Mapping):
                    message = f"a rule is a mapping such as {{modules: language, method: milora}}, got {item!r}"
                    raise PolicyError(message, code="policy-value")
                rules.append(item if isinstance(item, Rule) else Rule(**{str(key): v for key, v in item.items()}))
            except PolicyError as error:
                problems += [problem.inside("policy", number) for problem in error.problems]
        if problems:
            raise PolicyError(problems=problems)
        return Policy(tuple(rules))

    def resolve(self, model: nn.Module) -> list[Target]:
        """Return one Target per module that trains, in model order.

        Raises PolicyError with all problems: rules that match nothing, fields that the method does not use, ranks
        larger than a matrix.

        >>> from torch import nn
        >>> policy = Policy.parse("- {modules: language, method: milora, rank: 2}")
        >>> [(t.path, t.shape, t.rank, t.alpha) for t in policy.resolve(nn.Sequential(nn.Linear(4, 6)))]
        [('0', (6, 4), 2, 2.0)]
        """
        from milora_vl.core.policy.resolve import resolve  # imports PEFT, which parsing a recipe does not need

        return resolve(self.rules, model)

    def to_list(self) -> list[dict[str, Any]]:
        return [rule.model_dump(exclude_defaults=True) for rule in self.rules]


def _text_of(source: str | Path) -> str:
    if isinstance(source, str) and not re.fullmatch(r".+\.ya?ml", source):
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "expected rules as a YAML text, or the name of a YAML file"
        message = f"cannot read the file: {error}"
        raise PolicyError(message, code="file-unreadable", where=str(source), hint=hint) from None


def _load_yaml(text: str) -> Any:
    try:
        return parse_yaml(text)
    except YamlTextError as error:
        message = f"not valid YAML: {error}"
        raise PolicyError(message, code="yaml-syntax", where=Key.of("policy"), hint=_EXAMPLE) from error


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
    policy: Policy, model: nn.Module, rank: SpectralRank, spectrum: Callable[[str], Tensor], *, is_shown: bool = False
) -> Policy:
    """Return the policy with one more rule for each module that has an adapter: its rank. Scales alpha/rank stay.

    `model` may be on the meta device: `spectrum` returns the singular values, descending, of the weight at a path.
    `is_shown` shows a progress bar. Raises PolicyError for a policy that does not fit the model, and for a budget that
    is too small.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> policy = Policy.parse("- {modules: language, method: milora, rank: 1}")
    >>> sigma = torch.tensor([4.0, 3.0, 2.0, 1.0])
    >>> found = with_ranks(policy, model, SpectralRank(threshold=0.5), lambda path: sigma)
    >>> found.to_list()[1:]
    [{'modules': '0', 'rank': 2}]
    """
    adapters = [target for target in _any_rank(policy).resolve(model) if target.rank is not None]
    if not adapters:
        where = Key.of("policy")
        raise PolicyError("no rule makes an adapter", code="policy-no-adapter-rule", where=where, hint=_EXAMPLE)
    spectra: dict[str, Tensor] = {}
    with progress_bar("reading spectra", len(adapters), "matrices", is_shown=is_shown) as bar:
        for target in adapters:
            spectra[target.path] = spectrum(target.path).flip(0)
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
        message = f"{budget:,} parameters are too few: rank {rank.min} in every module needs {budget - left:,}"
        hint = "raise the budget, or select fewer modules"
        raise PolicyError(message, code="policy-rank", where=Key.of("budget"), hint=hint)
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
