"""Check and warn about `protect` in a recipe: sharding, calibration files, methods that cannot protect."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import beside
from milora_vl.recipe.schema import CalibrationConfig, Recipe


def require_supported(recipe: Recipe) -> None:
    """Raise UserError for a recipe whose rules protect what the form or the sharding of the run does not allow."""
    kinds = protected_kinds(recipe)
    ways = {rule["protect"].get("by", "projection") for rule in _protecting(recipe)}
    refuse_shards(ways, deepspeed=bool(recipe.train.get("deepspeed")), fsdp=bool(recipe.train.get("fsdp")))
    _require_files(recipe.calibration)
    if "inputs" in kinds and recipe.form == "residual":
        raise UserError(
            "protect: {inputs: p} needs form anchored",
            code="adapter-residual-layer",
            where="form",
            hint="use form anchored, or remove protect",
        )


def _require_files(calibration: CalibrationConfig) -> None:
    files = {"text": calibration.text or [], "data": [calibration.data] if calibration.data else []}
    for key, names in files.items():
        for name in names:
            if not Path(name).exists() and not name.startswith("hub:"):
                raise UserError(
                    f"{name}: no such file", code="path-missing", where=f"calibration.{key}", hint=beside(Path(name))
                )


def protected_kinds(recipe: Recipe) -> set[str]:
    """Return which kinds of protection the rules use: top, inputs or both."""
    protecting = [rule["protect"] for rule in _protecting(recipe)]
    return {"inputs" if protect.get("inputs") is not None else "top" for protect in protecting}


def _protecting(recipe: Recipe) -> list[dict[str, Any]]:
    return [rule for rule in recipe.policy or () if rule.get("protect")]


def warnings(recipe: Recipe) -> list[str]:
    """Return a warning if the recipe has a calibration that no rule uses, for example because of --method full."""
    if recipe.calibration == CalibrationConfig() or "inputs" in protected_kinds(recipe):
        return []
    return ["the calibration has no effect: no rule has  protect: {inputs: p}"]


def refuse_shards(ways: Collection[str], *, deepspeed: bool, fsdp: bool) -> None:
    """Raise UserError if optimizer steps update shards of the factors, and a rule protects by one of these `ways`.

    Shards can be projected, see `ShardedProjection`, but `basis` needs whole gradients, and `penalty` the learning rate
    of each factor.
    """
    refused = sorted(set(ways) - {"projection"}) if deepspeed or fsdp else []
    if refused:
        raise UserError(
            f"protect (by: {refused[0]}) does not work with {'FSDP' if fsdp else 'DeepSpeed'}, which updates shards of "
            "the factors",
            code="protect-sharded",
            where="policy",
            hint="use  by: projection, or start several processes with torchrun alone",
        )
