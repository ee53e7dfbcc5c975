"""Faults of a policy that only show on a model, told together with those of the recipe, before any weights load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from milora_data.errors import UserError


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
