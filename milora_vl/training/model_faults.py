"""Faults of a policy that only show on a model, told together with those of the recipe, before any weights load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from milora_data.command import amount
from milora_data.errors import UserError
from milora_vl.config import Recipe


def faults_on(rules: Sequence[Mapping[str, Any]], config: Any, *, implicit: bool = False) -> list[str]:
    """Return what `rules` say wrongly of the model of that config, each `policy[1].rank: ...`.

    Faults of the rules themselves are among them. None where the config makes no model.
    `implicit`: the rules are our default, whose projector rule goes where there is a projector.
    """
    from milora_vl.policy import Policy, PolicyError
    from milora_vl.towers import find_towers
    from milora_vl.training.dry_run import meta_model

    try:
        base = meta_model(config)
        if implicit and find_towers(base).projector is None:
            rules = [rule for rule in rules if rule["modules"] != "projector"]
        Policy.settle(rules, base)
    except PolicyError as error:
        return re.split(r"\n(?! )", str(error))
    except (UserError, ValueError):
        return []
    return []


def of_default_rank(faults: Sequence[str]) -> list[str]:
    """Return the same faults, those of a rank that nobody gave as one with the flag that mends it.

    >>> of_default_rank(["policy[0].rank: 128 is larger than min(out, in) = 64 of shape (64, 64): a, b"])
    ['the default rank 128 is too large for this model, which has matrices of rank 64\\nsay:  --rank 64, or less']
    """
    pattern = re.compile(r"policy\[\d+\]\.rank: (\d+) is larger than min\(out, in\) = (\d+) ")
    large = {fault: match for fault in faults if (match := pattern.match(fault))}
    if not large:
        return list(faults)
    default, most = next(iter(large.values()))[1], min(int(match[2]) for match in large.values())
    told = f"the default rank {default} is too large for this model, which has matrices of rank {most}"
    return [*(fault for fault in faults if fault not in large), f"{told}\nsay:  --rank {most}, or less"]


def require_float_weights(recipe: Recipe, config: Any) -> None:
    """UserError for a rule that trains a quantised weight itself: integers have no gradient."""
    from milora_vl.policy import Policy
    from milora_vl.quantized import is_quantized
    from milora_vl.training.build import rules_for
    from milora_vl.training.dry_run import meta_model

    base = meta_model(config)
    targets = Policy.settle(rules_for(recipe, base, implicit=True).policy or [], base)
    packed = [t.path for t in targets if t.rank is None and is_quantized(t.path, base.get_submodule(t.path))]
    if packed:
        raise UserError(
            f"quantization {recipe.quantization}: {amount(len(packed), 'module')} would train in full, "
            f"first {packed[0]}\n"
            "a quantised weight cannot train; an adapter on it can: --lora_enable True, or --method milora"
        )
