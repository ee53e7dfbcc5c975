"""A policy whose ranks follow from the singular values of a model: `python -m milora_vl.analyze ranks`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from torch import Tensor

from milora_vl.analyze.weights import open_weights
from milora_vl.common.cli.command_line import amount
from milora_vl.core.policy import Policy
from milora_vl.core.policy.policy import SpectralRank, with_ranks
from milora_vl.core.policy.rules import DEFAULT_RULES, without_projector
from milora_vl.core.weights.tensor_files import cached_singular_values
from milora_vl.models.devices import device_named


def write(model: str, rank: SpectralRank, rules: str | None, *, cache: Path | None, device: str | None) -> None:
    """Write the policy to stdout. `rules` is the policy that selects the modules (YAML text or a file), or None.

    Raises UserError if the rules do not fit the model.
    """
    policy = None if rules is None else Policy.parse(rules)
    weights, place = open_weights(model), device_named(device)
    if policy is None:
        has_projector = weights.towers.projector is not None
        policy = Policy.parse(DEFAULT_RULES if has_projector else without_projector(DEFAULT_RULES))

    def spectrum(path: str) -> Tensor:
        return cached_singular_values(weights.matrix(path).to(place), cache)

    found = with_ranks(policy, weights.model, rank, spectrum, is_shown=True)
    sys.stdout.write(yaml.safe_dump(found.to_list(), sort_keys=False, default_flow_style=None, width=1000))
    ranks = [rule.rank for rule in found.rules[len(policy.rules) :] if rule.rank is not None]
    mean = sum(ranks) / len(ranks)
    sys.stderr.write(f"{amount(len(ranks), 'adapter')}: ranks {min(ranks)} to {max(ranks)}, {mean:.1f} on average\n")
