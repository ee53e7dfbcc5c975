"""Devices and dtypes by the names of flags and recipes (`--device`, `--dtype fastest`), and the device that trains."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch


def device_named(name: str | None) -> torch.device:
    """Return the device of that name; by default the GPU, else the CPU. Apple's GPU has to be named."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(name) if name else gpu if gpu is not None and gpu.type != "mps" else torch.device("cpu")


def dtype_named(name: str | None, device: torch.device) -> torch.dtype | None:
    """Return the dtype of that name (`fastest`: see `fastest_dtype`); None without a name.

    >>> dtype_named("float32", torch.device("cpu"))
    torch.float32
    """
    if name is None:
        return None
    return fastest_dtype(device) if name == "fastest" else getattr(torch, name)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device supports it natively, else float32, because emulation on a CPU is slow.

    CPUs with AVX512-BF16 get bfloat16; ARM CPUs and Apple GPUs get float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and "avx512_bf16" in _cpu_flags()
    return torch.bfloat16 if native else torch.float32


@cache
def _cpu_flags() -> frozenset[str]:
    """Return the names of the instructions of the CPU; empty on other systems than Linux on x86."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def train_device(train: Mapping[str, Any]) -> torch.device:
    """Return the device type of a run with this `train:` section, before TrainingArguments exist."""
    if train.get("use_cpu"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
