"""The recipe that a run folder holds, read without torch: what trained a model decides how it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_vl.common.yaml_text import read_file


def recipe_of_run(folder: Path) -> dict[str, Any]:
    """Return the content of the recipe.yaml in a run folder, or in the folder above a checkpoint; empty without one.

    Raises UserError if the recipe cannot be read.
    """
    file = next((place / "recipe.yaml" for place in (folder, folder.parent) if (place / "recipe.yaml").is_file()), None)
    return {} if file is None else read_file(file)


def trained_template(folder: Path) -> str:
    """Return the template of a run, by default LLaVA-1.5's. `folder` is as in `recipe_of_run`."""
    return recipe_of_run(folder).get("template") or "vicuna_v1"
