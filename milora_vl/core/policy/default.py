"""The default policy: what `milora_vl.train` trains without a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RuleDict = dict[str, Any]

# MiLoRA off the protected inputs (docs/studies/default.md). Rank and rate of the language tower are from the paper's
# LLaVA-1.5-7B (arXiv:2406.09044, Table 11).
DEFAULT_RULES: tuple[RuleDict, ...] = (
    {"modules": "language", "method": "milora", "rank": 128, "alpha": 128, "dropout": 0.05, "learning_rate": 2e-4},
    {"modules": "projector", "method": "milora", "rank": 64, "alpha": 64, "dropout": 0.05, "learning_rate": 2e-4},
)
# A projector with random weights cannot learn its task at rank 64; the rate is that of LLaVA's first stage.
UNALIGNED_PROJECTOR: RuleDict = {"modules": "projector", "method": "full", "learning_rate": 1e-3}
# A projector without linear layers takes no adapter; the rate is that of LLaVA's second stage.
FULL_PROJECTOR: RuleDict = {"modules": "projector", "method": "full", "learning_rate": 2e-5}


def without_projector(rules: Sequence[Mapping[str, Any]]) -> list[RuleDict]:
    """Return the default rules for a model without a projector.

    >>> [rule["modules"] for rule in without_projector(DEFAULT_RULES)]
    ['language']
    """
    return [dict(rule) for rule in rules if rule["modules"] != "projector"]
