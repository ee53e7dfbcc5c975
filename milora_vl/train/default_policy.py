"""The default rules of a policy, as they fit the base that a run trains."""

from __future__ import annotations

from milora_vl.common.errors import UserError
from milora_vl.core.policy import Policy, PolicyError
from milora_vl.core.policy.resolve import RankTooLarge
from milora_vl.core.policy.rules import FULL_PROJECTOR, UNALIGNED_PROJECTOR, RuleDict, without_projector
from milora_vl.models.base import Base
from milora_vl.train.join_settings import Settings


def default_rules(settings: Settings, base: Base) -> tuple[list[RuleDict], list[str]]:
    """Return the default rules as they fit a base, after the flags, and notes about what is not as usual."""
    recipe, edits, notes = settings.recipe, settings.request.edits, list[str]()
    rules = list(recipe.policy or [])
    projector = None if edits.train == "language" else base.towers.projector
    rate = {} if edits.mm_projector_lr is None else {"learning_rate": edits.mm_projector_lr}
    if projector is None:
        useless = "--mm_projector_lr" if rate else "--train" if edits.train == "projector" else None
        if useless:
            message, hint = f"{base.name} has no projector", "remove the flag"
            raise UserError(message, code="flag-no-effect", where=useless, hint=hint)
        rules = without_projector(rules)
    elif recipe.projector_weights:
        rules = [*without_projector(rules), FULL_PROJECTOR | rate]
        notes.append(
            "the base does not hold the projector of  --projector_weights, so it trains in full and unprotected, and "
            "the adapter holds it"
        )
    elif base.parts is not None:
        rules = [*without_projector(rules), UNALIGNED_PROJECTOR | rate]
        notes.append(
            "the projector has never been aligned, so it trains in full and unprotected; align it first with  "
            "--recipe pretrain-projector-llava, then pass  --projector_weights"
        )
    elif not _takes_adapter("projector", base):
        rules = [*without_projector(rules), FULL_PROJECTOR | rate]
        notes.append("the projector has no linear layers, so it trains in full and unprotected")
    if edits.rank is None:
        try:
            Policy.parse(rules).resolve(base.meta)
        except PolicyError as error:
            largest = [problem.largest for problem in error.problems if isinstance(problem, RankTooLarge)]
            if largest:
                rank = max(1, min(largest) // 2)
                rules = [{**rule, "rank": rank, "alpha": rank} if "rank" in rule else rule for rule in rules]
                notes.append(f"the smallest matrix of this model has rank {min(largest)}: the ranks are {rank}")
    return rules, notes


def _takes_adapter(modules: str, base: Base) -> bool:
    try:
        return bool(Policy.parse([{"modules": modules, "method": "lora", "rank": 1}]).resolve(base.meta))
    except PolicyError:
        return False
