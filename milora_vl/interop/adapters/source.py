"""Recognize the kind of an adapter folder by its files: ours, plain PEFT, LLaVA's, or with a residual base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from milora_vl.common.cli.command_line import beside
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.files import require_adapter_files
from milora_vl.core.adapter.folders import (
    CONFIG,
    adapters_inside,
    has_config,
    holds_llava_adapter,
    no_adapter_in,
    not_a_folder,
)
from milora_vl.core.adapter.sidecar import FILE_NAME

AdapterKind = Literal["ours", "plain", "llava", "residual"]
# Subfolders with initial factors: PEFT and LLaMA-Factory, ms-swift, the official MiLoRA, ours.
INITIAL_NAMES = ("pissa_init", "milora_init", "lora_init", "initial_model")
# The official MiLoRA script writes the initial adapter here, trains it, and writes the result to output_dir.
OFFICIAL_NAME = "lora"


@dataclass(frozen=True, slots=True)
class Source:
    """A folder and its kind; for `residual` also the folders of the residual base and of the initial factors."""

    kind: AdapterKind
    folder: Path
    residual: Path | None = None
    initial: Path | None = None


def find_source(folder: Path, residual: Path | None = None, initial: Path | None = None) -> Source:
    """Return the kind of `folder`; `residual` and `initial` name folders that it does not contain.

    Raises UserError if the folder has no adapter, and AdapterError if files cannot be read.
    """
    problem = not_a_folder(folder)
    if problem is not None:
        raise UserError(problems=[problem])
    for path in (residual, initial):
        if path is not None and not path.is_dir():
            raise UserError("no such folder", code="path-missing", where=str(path), hint=beside(path))
    trained = _trained(folder)
    if trained is None:
        raise UserError(problems=[no_adapter_in(folder, "", "milora_vl.export", "--to", "FORM")])
    for path in (trained, initial):
        if path is not None:
            require_adapter_files(path)
    residual = residual or _residual_of(folder)
    if holds_llava_adapter(trained):
        return Source("llava", trained)
    if residual is None and initial is None and (trained / FILE_NAME).is_file():
        return Source("ours", trained)
    initial = initial or _initial_of([folder, trained, *([residual] if residual else [])], trained)
    if residual is not None or initial is not None:
        return Source("residual", trained, residual, initial)
    return Source("plain", trained)


def _holds_model(folder: Path) -> bool:
    has_weights = any(folder.glob("model.safetensors*")) or any(folder.glob("pytorch_model.bin*"))
    return has_weights and (folder / "config.json").is_file()


def _trained(folder: Path) -> Path | None:
    """Return the trained adapter: the folder, or the subfolder of a folder with a residual base."""
    if has_config(folder):
        return folder
    if not _holds_model(folder):
        return None
    subfolders = adapters_inside(folder)
    others = [path for path in subfolders if path.name not in INITIAL_NAMES]
    return next(iter(others or subfolders), None)


def _residual_of(folder: Path) -> Path | None:
    """Return the residual base: the folder, or the base that its adapter names if it contains an initial adapter."""
    if _holds_model(folder) and not has_config(folder) and _trained(folder) is not None:
        return folder
    if not has_config(folder):
        return None
    named = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = Path(named) if named and isinstance(named, str) else None
    if base is None or not base.is_dir() or not _holds_model(base):
        return None
    return base if _initial_of([base], None) is not None else None


def _initial_of(folders: list[Path], trained: Path | None) -> Path | None:
    """Return the initial adapter in one of the folders; `lora` counts only beside a model (official MiLoRA)."""
    for folder in folders:
        names = [*INITIAL_NAMES, OFFICIAL_NAME] if _holds_model(folder) else INITIAL_NAMES
        for name in names:
            if has_config(folder / name) and (name != OFFICIAL_NAME or folder / name != trained):
                return folder / name
    # A residual base with one untrained adapter: its factors are the initial ones.
    if trained is not None and trained.name == OFFICIAL_NAME and _holds_model(trained.parent):
        return trained
    return None
