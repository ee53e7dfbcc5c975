"""What a folder holds, told by its files: an adapter, a projector alone, a text model. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

from milora_data.errors import UserError
from milora_vl.models.names import PROJECTOR_FILES


def holds_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter: PEFT's files and no whole model beside them, or LLaVA's, with its config."""
    is_llava = (folder / "non_lora_trainables.bin").is_file()
    return (folder / "adapter_config.json").is_file() and (is_llava or not (folder / "config.json").is_file())


def holds_residual(folder: Path) -> bool:
    """Whether `folder` holds a model that an adapter in one of its subfolders was trained on (PiSSA's, MiLoRA's)."""
    return (folder / "config.json").is_file() and any(folder.glob("*/adapter_config.json"))


def holds_projector_alone(folder: Path) -> bool:
    """Whether `folder` holds a projector and no adapter."""
    adapter = (folder / "adapter_config.json").is_file()
    return not adapter and any((folder / name).is_file() for name in PROJECTOR_FILES)


def base_of(folder: Path) -> str:
    """Return the name of the base model that an adapter was made for.

    Raises UserError where its adapter_config.json does not say, or cannot be read.
    """
    file = folder / "adapter_config.json"
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read (cut off?): {error}") from None
    if not named:
        raise UserError(f"{folder}/adapter_config.json names no base model\ntry: --model BASE --adapter {folder}")
    return str(named)


def holds_text_model(folder: Path) -> bool:
    """Whether a run's folder holds a tokenizer without the processor of a model that sees."""
    processors = ("processor_config.json", "preprocessor_config.json")
    return (folder / "tokenizer_config.json").is_file() and not any((folder / name).is_file() for name in processors)
