"""Learning rate and weight decay of what trains: those in force, and warnings of those that were hardly meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from milora_vl.policy import Target
from milora_vl.training import hf_arguments

LLAVA_FULL_RATE = 2e-5
HIGH_FULL_RATE = 5e-5


def in_force(targets: Sequence[Target], train: Mapping[str, Any]) -> list[Target]:
    """Return the targets with the run's learning rate and weight decay where their rules set none."""
    rate, decay = (train.get(name, hf_arguments.flags()[name].default) for name in ("learning_rate", "weight_decay"))
    return [
        replace(
            target,
            learning_rate=rate if target.learning_rate is None else target.learning_rate,
            weight_decay=decay if target.weight_decay is None else target.weight_decay,
        )
        for target in targets
    ]


def warnings(targets: Sequence[Target], train: Mapping[str, Any], *, method: str | None = None) -> list[str]:
    """Return what to warn of before a training: a default rate, decay of an anchored adapter, a high rate in full.

    `targets` are as their rules have them; `method` is that of --method.
    """
    found = _default_rate([t for t in targets if t.learning_rate is None], train)
    settled = in_force(targets, train)
    found += _anchored_decay(settled)
    if method == "full":
        rate = max((t.learning_rate or 0.0 for t in settled), default=0.0)
        if rate > HIGH_FULL_RATE:
            found.append(
                f"full training at a learning rate of {rate:g}; LLaVA uses {LLAVA_FULL_RATE:g} (--learning_rate)"
            )
    return found


def _default_rate(targets: Sequence[Target], train: Mapping[str, Any]) -> list[str]:
    if not targets or "learning_rate" in train:
        return []
    default = hf_arguments.flags()["learning_rate"].default
    return [
        f"{_names(targets)} train at {default:g}, Hugging Face's default learning rate: no rule and no flag sets "
        "one. Set learning_rate in the rule, or --learning_rate (the default policy has 2e-4 for adapters, 2e-5 for "
        "the projector)"
    ]


def _anchored_decay(targets: Sequence[Target]) -> list[str]:
    """Decay of A and B pulls s (B A - B0 A0) towards -s B0 A0: no update is where A and B are as they started."""
    decayed = [t for t in targets if t.has_anchor and t.weight_decay]
    if not decayed:
        return []
    values = sorted({t.weight_decay or 0.0 for t in decayed})
    names = ", ".join(f"{_names(t for t in decayed if t.weight_decay == value)} {value:g}" for value in values)
    return [
        f"weight decay on {names}: A and B start from components of the weight, so decay removes these from the model: "
        "it pulls towards W - s B0 A0, not towards W. Set weight_decay: 0 in the rule, or --weight_decay 0 (with "
        "--method lora, decay pulls towards W)"
    ]


def _names(targets: Iterable[Target]) -> str:
    """The towers and methods of some targets.

    >>> _names([Target(path="lm.q", shape=(4, 4), tower="language", method="milora")])
    'language (milora)'
    """
    return ", ".join(sorted({f"{target.tower or 'other modules'} ({target.method})" for target in targets}))
