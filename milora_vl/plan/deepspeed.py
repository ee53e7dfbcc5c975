"""The DeepSpeed configuration of a run, and settings of launchers that are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llava_recipes
from milora_data.command.cli import did_you_mean, suggest
from milora_data.errors import Problem, UserError
from milora_data.json_text import parse_json

NO_FSDP = Problem(
    "FSDP is not supported: saving and resuming are tested only with DeepSpeed",
    "launch-fsdp",
    hint="use --deepspeed zero3, which shards the same tensors, and remove --fsdp\n"
    "in the configuration of accelerate: distributed_type: MULTI_GPU",
)
FOREIGN_DEEPSPEED = Problem(
    "accelerate has DeepSpeed settings, so every process would load the whole model",
    "launch-accelerate-deepspeed",
    hint="pass the settings to this command: --deepspeed zero2, zero3, zero3_offload or a JSON file\n"
    "and let accelerate only start the processes: distributed_type: MULTI_GPU",
)


def check_launcher(train: Mapping[str, Any]) -> None:
    """Raise UserError, before anything loads, for launcher settings that are not supported."""
    if train.get("fsdp") or _is_on("ACCELERATE_USE_FSDP"):
        raise UserError(problems=[NO_FSDP])
    if not train.get("deepspeed") and _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(problems=[FOREIGN_DEEPSPEED])


def named_config(name: str) -> Any:
    """Return the configuration of a packaged name (zero2, zero3, zero3_offload), or the path of a file unchanged."""
    if name in llava_recipes.names("deepspeed"):
        return json.loads(llava_recipes.read(name, "deepspeed"))
    if Path(name).is_file():
        return name
    near = suggest(Path(name).stem, llava_recipes.names("deepspeed"))
    raise UserError(
        f"expected {', '.join(llava_recipes.names('deepspeed'))} or a JSON file, got {name}",
        code="deepspeed-unknown",
        where="--deepspeed",
        hint=did_you_mean(near[:1]) or "name one of these, or a file that exists",
    )


def run_config(config: Mapping[str, Any] | str) -> tuple[dict[str, Any], list[str]]:
    """Return the DeepSpeed configuration of a run, from a mapping or a file, and warnings about changes.

    Rules of the policy set learning rates, so the Trainer builds optimizer and schedule; DeepSpeed's optimizer would
    silently use one rate for all. Raises UserError for a file without a JSON object.
    """
    content: Any = config
    if isinstance(config, str):
        try:
            content = parse_json(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{config} is not a JSON file: {error}",
                code="deepspeed-settings",
                where="--deepspeed",
                hint="use zero2, zero3 or zero3_offload, or correct the file",
            ) from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"expected a JSON object with zero_optimization, ..., found {type(content).__name__} in {config}",
            code="deepspeed-settings",
            where="--deepspeed",
        )
    settings, warnings = parse_json(json.dumps(content)), []
    for block, flags in {"optimizer": "--optim and the policy", "scheduler": "--lr_scheduler_type"}.items():
        if settings.pop(block, None) is not None:
            warnings.append(f"deepspeed: its {block} has no effect; use {flags}")
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)  # without it the saved files are unusable
    settings.setdefault("zero_force_ds_cpu_optimizer", False)  # that optimizer would need a compiler
    return settings, warnings


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
