"""Which kind of folder was given, told by its files: ours, plain PEFT, LLaVA's, or one on a residual base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from milora_data.errors import UserError
from milora_vl.adapter_io import require_adapter
from milora_vl.adapters.folders import holds_projector_alone
from milora_vl.adapters.llava import is_llava_folder
from milora_vl.lora.sidecar import FILE_NAME

Kind = Literal["ours", "plain", "llava", "residual"]
# Subfolders by which code bases keep the initial factors: PEFT and LLaMA-Factory, ms-swift, the official MiLoRA, ours.
INITIAL_NAMES = ("pissa_init", "milora_init", "lora_init", "initial_model")
# The official MiLoRA script puts the initial adapter here, trains it, and puts the result wherever output_dir says.
OFFICIAL_NAME = "lora"


@dataclass(frozen=True, slots=True)
class Source:
    """A folder and what it is. Of a residual kind: the folder of the residual base, and that of the initial factors."""

    kind: Kind
    folder: Path
    residual: Path | None = None
    initial: Path | None = None


def find_source(folder: Path, residual: Path | None = None, initial: Path | None = None) -> Source:
    """Tell what `folder` is; `residual` and `initial` name what it does not tell. UserError for no known kind.

    Raises AdapterError for files that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}")
    for path in (residual, initial):
        if path is not None and not path.is_dir():
            raise UserError(f"no folder at {path}")
    trained = _trained(folder)
    if trained is None:
        raise UserError(_explain(folder))
    for path in (trained, initial):
        if path is not None:
            require_adapter(path)
    residual = residual or _residual_of(folder)
    if is_llava_folder(trained):
        return Source("llava", trained)
    if residual is None and initial is None and _has(trained, FILE_NAME):
        return Source("ours", trained)
    initial = initial or _initial_of([folder, trained, *([residual] if residual else [])], trained)
    if residual is not None or initial is not None:
        return Source("residual", trained, residual, initial)
    return Source("plain", trained)


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _holds_model(folder: Path) -> bool:
    return _has(folder, "config.json") and any(
        _has(folder, name)
        for name in (
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        )
    )


def _trained(folder: Path) -> Path | None:
    """The adapter that was trained: the folder itself, or, of a folder with a residual base, its subfolder."""
    if _has(folder, "adapter_config.json"):
        return folder
    if not _holds_model(folder):
        return None
    subfolders = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    others = [path for path in subfolders if path.name not in INITIAL_NAMES]
    return next(iter(others or subfolders), None)


def _residual_of(folder: Path) -> Path | None:
    """The residual base: the folder itself, or the base that its adapter names, if an initial adapter lies in there."""
    if _holds_model(folder) and not _has(folder, "adapter_config.json") and _trained(folder) is not None:
        return folder
    if not _has(folder, "adapter_config.json"):
        return None
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = Path(named) if named else None
    if base is None or not base.is_dir() or not _holds_model(base):
        return None
    return base if _initial_of([base], None) is not None else None


def _initial_of(folders: list[Path], trained: Path | None) -> Path | None:
    """The initial adapter in one of the folders; `lora` counts beside a model alone, where official MiLoRA puts it."""
    for folder in folders:
        names = [*INITIAL_NAMES, OFFICIAL_NAME] if _holds_model(folder) else INITIAL_NAMES
        for name in names:
            if _has(folder / name, "adapter_config.json") and (name != OFFICIAL_NAME or folder / name != trained):
                return folder / name
    # A residual base with one adapter, never trained on: its factors are the initial ones.
    if trained is not None and trained.name == OFFICIAL_NAME and _holds_model(trained.parent):
        return trained
    return None


def _explain(folder: Path) -> str:
    inside = sorted(str(path.parent) for path in folder.glob("*/adapter_config.json"))
    if inside:
        return f"{folder} holds several things, no adapter itself\nname one:  {', '.join(inside[:6])}"
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    if holds_projector_alone(folder):
        return f"{folder} holds a projector alone\nuse it:  --model BASE --adapter {folder}"
    return (
        f"{folder} holds no adapter\n"
        f"found:     {found}\n"
        "expected:  adapter_config.json and adapter_model.safetensors (ours, PEFT's or LLaVA's),\n"
        f"           or a residual base with an adapter in one of {', '.join((OFFICIAL_NAME, *INITIAL_NAMES))}"
    )
