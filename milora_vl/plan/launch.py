"""Set up DeepSpeed and signals for processes that torchrun, accelerate or deepspeed start."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def check(train: Mapping[str, Any]) -> None:
    """Raise UserError, before anything loads, for launcher settings that are not supported."""
    if train.get("fsdp") or _is_on("ACCELERATE_USE_FSDP"):
        raise UserError(problems=[NO_FSDP])
    if not train.get("deepspeed") and _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(problems=[FOREIGN_DEEPSPEED])


def deepspeed_settings(config: Mapping[str, Any] | str) -> tuple[dict[str, Any], list[str]]:
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


def before_arguments(train: Mapping[str, Any]) -> None:
    """Set the environment variables of DeepSpeed; without a launcher it would look for MPI."""
    if train.get("use_cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if train.get("deepspeed") and "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        for name, value in {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}.items():
            os.environ.setdefault(name, value)


def after_arguments(train: Mapping[str, Any]) -> None:
    """Initialize DeepSpeed in the process group of TrainingArguments: HF skips that on CPUs, and ZeRO-3 needs it."""
    if train.get("deepspeed"):
        import deepspeed

        if train.get("use_cpu"):
            # DeepSpeed would compile an inference kernel. If it is killed while compiling, it leaves a stale lock file
            # that blocks later runs.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)


@contextmanager
def calls_on_sigterm(callback: Callable[..., object]) -> Iterator[None]:
    """Inside this context SIGTERM calls `callback` instead of ending the process."""
    before = signal.signal(signal.SIGTERM, callback)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
