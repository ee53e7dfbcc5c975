"""Which model an evaluation is about, told from its folders, and where its files go."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from milora_data.command import suggest
from milora_data.errors import UserError
from milora_vl.adapters.folders import base_of, holds_adapter, holds_projector_alone, holds_residual


@dataclass(frozen=True, slots=True)
class EvalTarget:
    """What to load: a model, the adapter on it (or None), the base to compare with (or None: the model itself).

    `which` is base, final or checkpoint-N.
    """

    model: str
    adapter: Path | None
    base: str | None
    which: str

    @property
    def has_base(self) -> bool:
        """Whether there is something untouched to compare with."""
        return self.adapter is not None or self.base is not None

    @property
    def folder(self) -> Path:
        """The folder that was trained: of the adapter, or of the model."""
        return self.adapter or Path(self.model)


def eval_target(model: str, adapter: Path | None, base: str | None) -> EvalTarget:
    """Resolve the flags --model, --adapter and --base; UserError where they do not fit together."""
    folder = Path(model)
    if adapter is None and holds_adapter(folder):
        model, adapter = base_of(folder), folder
    if adapter is not None:
        if base is not None:
            raise UserError("--base is for a fully trained --model; the base of an adapter is its --model")
        _check_adapter(adapter, model)
        return EvalTarget(model, adapter, None, _which(adapter))
    is_trained = base is not None or (folder / "recipe.yaml").is_file() or _is_checkpoint(folder)
    return EvalTarget(model, None, base, _which(folder) if is_trained else "base")


def recipe_of(folder: Path) -> dict[str, object]:
    """Return template and picture handling that a run was trained with; empty for a folder that is no run."""
    for place in (folder, folder.parent):
        path = place / "recipe.yaml"
        if path.is_file():
            recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            data = recipe.get("data") or {}
            return {"template": recipe.get("template"), "image_aspect_ratio": data.get("image_aspect_ratio")}
    return {}


def _check_adapter(folder: Path, model: str) -> None:
    if holds_adapter(folder) or holds_projector_alone(folder) or holds_residual(folder):
        return
    if not folder.is_dir():
        there = [path for path in sorted(folder.parent.glob("*")) if path.is_dir() and holds_adapter(path)]
        others = suggest(folder.name, [path.name for path in there]) or [path.name for path in there[:3]]
        raise UserError(
            f"no adapter: there is no folder {folder}\n"
            + (f"there are: {', '.join(str(folder.parent / name) for name in others)}\n" if others else "")
            + f"train one: python -m milora_vl.train --model {model} --data_path ... --output_dir {folder}"
        )
    inside = [path for path in sorted(folder.glob("checkpoint-*")) if holds_adapter(path)]
    near = f"adapters inside: {', '.join(map(str, inside[-3:]))}" if inside else "it may be an unfinished run"
    full = f"\na fully trained model is evaluated with --model {folder} --base {model}"
    raise UserError(
        f"no adapter in {folder}: it has no adapter_config.json\n{near}"
        + (full if (folder / "config.json").is_file() else "")
    )


def _is_checkpoint(folder: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def _which(folder: Path) -> str:
    return folder.name if _is_checkpoint(folder) else "final"
