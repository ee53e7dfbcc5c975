"""Learning rate and weight decay of every target (defaults by method), and warnings about unusual rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from milora_vl.core.policy import Target
from milora_vl.train.recipe import hf_flags

LLAVA_FULL_RATE = 2e-5
HIGH_FULL_RATE = 5e-5


def in_force(targets: Sequence[Target], train: Mapping[str, Any]) -> list[Target]:
    """Return the targets; the learning rate and weight decay of the run fill the gaps of the rules."""
    rate, decay = (hf_flags.value_of(train, name) for name in ("learning_rate", "weight_decay"))
    return [
        replace(
            target,
            learning_rate=rate if target.learning_rate is None else target.learning_rate,
            weight_decay=decay if target.weight_decay is None else target.weight_decay,
        )
        for target in targets
    ]


def warnings(targets: Sequence[Target], train: Mapping[str, Any], *, method: str | None = None) -> list[str]:
    """Return warnings before training: a default rate, a high rate of full training.

    `targets` have the rates of their rules; `method` is the value of --method.
    """
    messages = _default_rate([t for t in targets if t.learning_rate is None], train)
    resolved = in_force(targets, train)
    if method == "full":
        rate = max((t.learning_rate or 0.0 for t in resolved), default=0.0)
        if rate > HIGH_FULL_RATE:
            messages.append(
                f"full training with a learning rate of {rate:g}; LLaVA uses {LLAVA_FULL_RATE:g} (--learning_rate)"
            )
    return messages


def _default_rate(targets: Sequence[Target], train: Mapping[str, Any]) -> list[str]:
    if not targets or "learning_rate" in train:
        return []
    default = hf_flags.flags()["learning_rate"].default
    return [
        f"{_names(targets)} use {default:g}, Hugging Face's default learning rate: no rule and no flag sets one. "
        "Set learning_rate in the rule, or --learning_rate (the default policy has 2e-4 for adapters and 2e-5 for "
        "the projector)"
    ]


def _names(targets: Iterable[Target]) -> str:
    """Return the towers and methods of some targets.

    >>> _names([Target(path="lm.q", shape=(4, 4), tower="language", method="milora")])
    'language (milora)'
    """
    return ", ".join(sorted({f"{target.tower or 'other modules'} ({target.method})" for target in targets}))
