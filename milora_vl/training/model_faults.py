"""Faults of a policy that only show on a model, told together with those of the recipe, before any weights load."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from milora_data.errors import UserError


def faults_on(rules: Any, model: Any) -> list[str]:
    """Return what `rules` say wrongly of the model with that name, by its config alone, each `policy[1].rank: ...`.

    Faults of the rules themselves are among them. None where the config is not to be had, or names no model.
    """
    from milora_vl import models
    from milora_vl.policy import Policy, PolicyError
    from milora_vl.training.dry_run import meta_model

    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules) or not model:
        return []
    try:
        base = meta_model(models.config_of(str(model)))
        Policy.settle(rules, base)
    except PolicyError as error:
        return re.split(r"\n(?! )", str(error))
    except (UserError, ValueError):
        return []
    return []
