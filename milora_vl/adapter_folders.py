"""What a folder holds, told by its files: an adapter, a projector alone, a text model. Needs no torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.command import command_line
from milora_data.errors import UserError
from milora_vl.lora.checkpoint_folders import holds_weights, newest_checkpoint, step_of

if TYPE_CHECKING:
    from milora_data.pixels import AspectRatio

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")


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


def newest_of_unfinished(folder: Path, *call: object) -> str:
    """Return lines to append to an error about a run that holds checkpoints and no result: what to do. Else "".

    `call` is what to type before the newest checkpoint: a module and arguments, or only arguments.
    """
    newest = newest_checkpoint(folder)
    if newest is None or holds_adapter(folder) or holds_weights(folder):
        return ""
    if call[-1] == "--adapter" and not (holds_adapter(newest) or holds_projector_alone(newest)):
        call = ("--model",)  # everything was trained: a checkpoint is a whole model
    module, *words = *map(str, call), str(newest)
    typed = shlex.join([module, *words]) if module.startswith("--") else command_line(module, *words)
    return (
        f"\nthe run in it has not finished; its newest checkpoint is of step {step_of(newest):,}\n"
        f"use it:    {typed}\n"
        "or resume: the training's command with  --resume_from_checkpoint auto"
    )


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


def trained_prompts(folder: Path) -> tuple[str, AspectRatio]:
    """Return the template, and what is done to pictures, that a run was trained with, by its recipe.yaml.

    `folder` is the run's or that of a checkpoint in it; vicuna_v1 and pad, LLaVA-1.5's, where nothing says so. Raises
    UserError for a recipe that cannot be read.
    """
    from milora_vl.training import yaml_file

    file = next((place / "recipe.yaml" for place in (folder, folder.parent) if (place / "recipe.yaml").is_file()), None)
    recipe = {} if file is None else yaml_file.read_file(file)[0]
    return recipe.get("template") or "vicuna_v1", (recipe.get("data") or {}).get("image_aspect_ratio") or "pad"
