"""What launchers leave to us: torchrun, accelerate and deepspeed start the processes, HF and DeepSpeed join them."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora_data.errors import UserError

FSDP = """FSDP is refused: saving under stock names and resuming are known to be right with DeepSpeed alone
use --deepspeed zero3, which shards the same, and leave --fsdp out
in accelerate's configuration: distributed_type: MULTI_GPU"""
OTHERS_DEEPSPEED = """accelerate brings DeepSpeed settings of its own; the model would load whole in every process
give them to this command instead: --deepspeed zero2, zero3, zero3_offload or a JSON file
and let accelerate only start the processes: distributed_type: MULTI_GPU"""


def check(train: Mapping[str, Any]) -> None:
    """UserError, before anything loads, for ways to start that would not do what they promise."""
    if train.get("fsdp") or _is_on("ACCELERATE_USE_FSDP"):
        raise UserError(FSDP)
    if not train.get("deepspeed") and _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(OTHERS_DEEPSPEED)


def deepspeed_settings(given: Mapping[str, Any] | str) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's configuration, of a mapping or a file, as a run needs it, and warnings about what was changed.

    Learning rates belong to rules of the policy, so optimizer and schedule are made here; DeepSpeed's own would take
    one rate for all and say nothing. UserError for a file that holds no JSON object.
    """
    content: Any = given
    if isinstance(given, str):
        try:
            content = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--deepspeed {given}: not a JSON file: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"--deepspeed {given}: expected an object with zero_optimization, ...")
    settings, warnings = json.loads(json.dumps(content)), []
    for block, flags in {"optimizer": "--optim and the policy", "scheduler": "--lr_scheduler_type"}.items():
        if settings.pop(block, None) is not None:
            warnings.append(f"deepspeed: its {block} has no effect, {flags} decide")
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)  # without it nothing usable is saved
    settings.setdefault("zero_force_ds_cpu_optimizer", False)  # it would have to be compiled
    return settings, warnings


def before_arguments(train: Mapping[str, Any]) -> None:
    """Tell DeepSpeed where it runs; it would look for MPI where no launcher has started this process."""
    if train.get("use_cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if train.get("deepspeed") and "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        for name, value in {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}.items():
            os.environ.setdefault(name, value)


def after_arguments(train: Mapping[str, Any]) -> None:
    """Let DeepSpeed join the processes that TrainingArguments has joined: on CPUs HF does not, and ZeRO-3 needs it."""
    if train.get("deepspeed"):
        import deepspeed

        if train.get("use_cpu"):
            # It would compile a shortcut for inference; one that is killed at that leaves a lock that all wait for.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)


@contextmanager
def calls_on_sigterm(heard: Callable[..., object]) -> Iterator[None]:
    """While inside, SIGTERM calls `heard` and does not end the process."""
    before = signal.signal(signal.SIGTERM, heard)
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
