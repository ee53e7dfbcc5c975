"""The default policy: what `milora_vl.train` trains without a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RuleDict = dict[str, Any]

# What forgets least at equal loss: docs/studies/fixed-a.md. Rank and rates are from the paper's LLaVA-1.5-7B (arXiv:
# 2406.09044, Table 11), and the projector trains as in LLaVA's script.
DEFAULT_RULES: tuple[RuleDict, ...] = (
    {
        "modules": "language",
        "method": "gradient",
        "rank": 128,
        "alpha": 128,
        "dropout": 0.05,
        "learning_rate": 2e-4,
    },
    {"modules": "projector", "method": "full", "learning_rate": 2e-5},
)


def without_projector(rules: Sequence[Mapping[str, Any]]) -> list[RuleDict]:
    """Return the default rules for a model without a projector.

    >>> [rule["modules"] for rule in without_projector(DEFAULT_RULES)]
    ['language']
    """
    return [dict(rule) for rule in rules if rule["modules"] != "projector"]
