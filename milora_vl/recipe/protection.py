"""Check that a run can protect the directions that its rules name."""

from __future__ import annotations

from milora_data.errors import UserError
from milora_vl.recipe.schema import Recipe


def check(recipe: Recipe) -> None:
    """Raise UserError for a recipe that protects directions although DeepSpeed or FSDP shards the factors."""
    if any(rule.get("protect") for rule in recipe.policy or ()):
        refuse_shards(deepspeed=bool(recipe.train.get("deepspeed")), fsdp=bool(recipe.train.get("fsdp")))


def refuse_shards(*, deepspeed: bool, fsdp: bool) -> None:
    """Raise UserError if optimizer steps update shards of the factors: a shard cannot be projected."""
    if deepspeed or fsdp:
        raise UserError(
            f"protect does not work with {'DeepSpeed' if deepspeed else 'FSDP'}, which updates shards of the factors",
            code="protect-sharded",
            where="policy",
            hint="start several processes with torchrun alone, or remove protect",
        )
