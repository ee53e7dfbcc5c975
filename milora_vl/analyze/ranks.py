"""`analyze ranks`: write a policy whose ranks follow from the singular values of a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import yaml
from torch import Tensor

from milora_vl.common.cli.console import amount
from milora_vl.common.errors import UserError
from milora_vl.common.progress import progress_bar
from milora_vl.core.policy import Policy
from milora_vl.core.policy.rules import DEFAULT_RULES, METHODS, Rule, Target, without_projector
from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.matrices import read_matrix
from milora_vl.core.weights.tensor_files import cached_singular_values
from milora_vl.models.devices import device_named
from milora_vl.models.loading import load_weights


def write_ranks(options: argparse.Namespace) -> None:
    """Write the policy to stdout: the rules, and one more for each module that has an adapter, with its rank.

    Raises UserError if the rules do not fit the model, and for a budget that is too small.
    """
    if options.max is not None and options.max < options.min:
        raise UserError(f"expected --min <= --max, got {options.min} and {options.max}", where="--min --max")
    policy = None if options.policy is None else Policy.parse(options.policy)
    model, device = load_weights(options.model), device_named(options.device)
    if policy is None:
        has_projector = find_towers(model).projector is not None
        policy = Policy.parse(DEFAULT_RULES if has_projector else without_projector(DEFAULT_RULES))
    rank_one = Policy(tuple(map(_with_rank_one, policy.rules)))  # fits every matrix
    targets = [target for target in rank_one.resolve(model) if target.rank is not None]
    if not targets:
        raise UserError("no rule makes an adapter", code="policy-no-adapter-rule", where="--policy")
    spectra = {}
    with progress_bar("reading spectra", len(targets), "matrices") as bar:
        for target in targets:
            W = read_matrix(model.get_submodule(target.path)).to(device)
            spectra[target.path] = cached_singular_values(W, options.factor_cache).flip(0)
            bar.update()
    ranks = ranks_of(targets, spectra, options)
    rules = [*policy.to_list(), *({"modules": path, "rank": rank} for path, rank in ranks.items())]
    sys.stdout.write(yaml.safe_dump(rules, sort_keys=False, default_flow_style=None, width=1000))
    few, most, mean = min(ranks.values()), max(ranks.values()), sum(ranks.values()) / len(ranks)
    sys.stderr.write(f"{amount(len(ranks), 'adapter')}: ranks {few} to {most}, {mean:.1f} on average\n")


def _with_rank_one(rule: Rule) -> Rule:
    takes_rank = rule.rank is not None or (rule.method is not None and "rank" in METHODS[rule.method].fields)
    return rule.model_copy(update={"rank": 1}) if takes_rank else rule


def ranks_of(targets: Sequence[Target], spectra: Mapping[str, Tensor], options: argparse.Namespace) -> dict[str, int]:
    """Return the rank of each target by path, within --min, --max and its size; `spectra` (k,) are ascending.

    A budget counts trained parameters: each unit of rank costs out + in, and out where A is fixed. It is spent on the
    components with the smallest sigma/sigma_max first.
    """
    largest = {target.path: min(options.max or min(target.shape), *target.shape) for target in targets}
    ranks = {path: min(options.min, most) for path, most in largest.items()}
    if options.budget is None:
        counts = {path: _count_minor(ascending, options) for path, ascending in spectra.items()}
        return {path: max(least, min(counts[path], largest[path])) for path, least in ranks.items()}
    cost = {target.path: sum(target.shape[: 1 if target.has_fixed_A else 2]) for target in targets}
    left = options.budget - sum(ranks[path] * cost[path] for path in ranks)
    if left < 0:
        needed, hint = f"{options.budget - left:,}", "raise the budget, or select fewer modules"
        message = f"{options.budget:,} parameters are too few: rank {options.min} in every module needs {needed}"
        raise UserError(message, code="policy-rank", where="--budget", hint=hint)
    further = []
    for path, ascending in spectra.items():
        shares = (ascending / ascending[-1].clamp(min=1e-30))[ranks[path] : largest[path]].tolist()
        further += [(float(f"{share:.5g}"), path) for share in shares]  # ties are then equal on every machine
    for _, path in sorted(further):
        if cost[path] <= left:
            left -= cost[path]
            ranks[path] += 1
    return ranks


def _count_minor(ascending: Tensor, options: argparse.Namespace) -> int:
    if options.threshold is not None:
        return int((ascending <= options.threshold * ascending[-1]).sum())
    energy = ascending.double().square().cumsum(0)
    return int((energy <= options.energy * energy[-1]).sum())
