"""Whether a run can keep the directions that its rules protect."""

from __future__ import annotations

from milora_data.errors import UserError
from milora_vl.recipe.schema import Recipe


def check(recipe: Recipe) -> None:
    """UserError for a recipe that protects directions of weights whose factors its run would share out."""
    if any(rule.get("protect") for rule in recipe.policy or ()):
        require_whole(deepspeed=bool(recipe.train.get("deepspeed")), fsdp=bool(recipe.train.get("fsdp")))


def require_whole(*, deepspeed: bool, fsdp: bool) -> None:
    """UserError where factors are stepped in shards, which cannot be projected."""
    if deepspeed or fsdp:
        raise UserError(
            f"policy: protect does not work with {'DeepSpeed' if deepspeed else 'FSDP'}, which steps shards of the "
            "factors\nleave it out (several processes by torchrun alone are fine), or leave protect out"
        )
