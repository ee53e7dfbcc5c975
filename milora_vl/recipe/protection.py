"""Check and warn about `protect` in a recipe: calibration files, and a form that cannot protect."""

from __future__ import annotations

from pathlib import Path

from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import beside
from milora_vl.recipe.schema import CalibrationConfig, Recipe


def require_supported(recipe: Recipe) -> None:
    """Raise UserError for calibration files that do not exist, and for the residual form with `protect`."""
    _require_files(recipe.calibration)
    if _protects(recipe) and recipe.form == "residual":
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


def _protects(recipe: Recipe) -> bool:
    return any(rule.get("protect") for rule in recipe.policy or ())


def warnings(recipe: Recipe) -> list[str]:
    """Return a warning if the recipe has a calibration that no rule uses, for example because of --method full."""
    if recipe.calibration == CalibrationConfig() or _protects(recipe):
        return []
    return ["the calibration has no effect: no rule has  protect: {inputs: p}"]
