"""Make HF's TrainingArguments for this process: environment, device, DeepSpeed, dtype of the trained weights."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from milora_vl.models.devices import fastest_dtype, train_device
from milora_vl.train.plan.launch import require_processes_for_fsdp
from milora_vl.train.plan.train_section import TrainSection, accepted_fields, refused
from milora_vl.train.recipe import hf_flags

if TYPE_CHECKING:
    from transformers import TrainingArguments


def for_this_process(section: TrainSection, output_dir: Path) -> tuple[TrainingArguments, list[str]]:
    """Return the arguments, and warnings about settings without effect. Raises UserError if HF rejects a value."""
    from transformers import TrainingArguments

    from milora_vl.common.compat.transformers import use_one_gpu

    train, warnings = deepcopy(section.arguments), list(section.warnings)  # HF writes into the settings of DeepSpeed
    device = train_device(train)
    if train.get("bf16") and device.type == "cpu" and fastest_dtype(device) != torch.bfloat16:
        warnings.append("bf16 is emulated by this CPU, which is slow (faster: --dtype float32 --bf16 False)")
    arguments, absent = hf_flags.for_installed(train, accepted_fields())
    if absent:
        warnings.append(f"the installed transformers does not support {', '.join(absent)}: no effect")
    require_processes_for_fsdp(train)
    with refused(train):
        _prepare_processes(train)
        args = TrainingArguments(output_dir=str(output_dir), **arguments)
        _start_deepspeed(train)
    if args.n_gpu > 1:
        warnings.append(
            f"this run uses one of {args.n_gpu} GPUs; to use all: "
            f"torchrun --nproc_per_node {args.n_gpu} -m milora_vl.train ..."
        )
        use_one_gpu(args)
    return args, warnings


def zero_stage(args: TrainingArguments) -> int:
    """Return the ZeRO stage of a run, 0 without DeepSpeed."""
    return int(args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)) if args.deepspeed else 0


def trained_dtype(args: TrainingArguments) -> torch.dtype:
    """Return the dtype of trained weights: float32, because half precision loses the steps of Adam.

    DeepSpeed in half precision keeps float32 copies and does not autocast, so all weights use its precision.
    """
    if args.deepspeed and args.hf_deepspeed_config.is_true("bf16.enabled"):
        return torch.bfloat16
    return torch.float16 if args.deepspeed and args.hf_deepspeed_config.is_true("fp16.enabled") else torch.float32


def load_device(args: TrainingArguments) -> torch.device:
    """Return the device to load and decompose the model on: the training device, or the CPU if it is sharded."""
    return torch.device("cpu") if args.deepspeed or args.fsdp else args.device


def _prepare_processes(train: Mapping[str, Any]) -> None:
    """Prepare what TrainingArguments initializes: the variables of DeepSpeed, and the timeout of processes on CPUs.

    Without a launcher DeepSpeed would look for MPI. On CPUs Hugging Face ignores `--ddp_timeout`.
    """
    if train.get("use_cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if train.get("ddp_timeout") and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            timeout = timedelta(seconds=train["ddp_timeout"])
            dist.init_process_group(train.get("ddp_backend") or "gloo", timeout=timeout)
    if train.get("deepspeed") and "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        for name, value in {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}.items():
            os.environ.setdefault(name, value)


def _start_deepspeed(train: Mapping[str, Any]) -> None:
    """Initialize DeepSpeed in the process group of TrainingArguments: HF skips that on CPUs, and ZeRO-3 needs it."""
    if train.get("deepspeed"):
        import deepspeed

        if train.get("use_cpu"):
            # DeepSpeed would compile an inference kernel. If it is killed while compiling, it leaves a stale lock file
            # that blocks later runs.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
