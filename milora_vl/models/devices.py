"""What to compute on and in: the names that command lines and recipes give to devices and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def device_named(name: str | None) -> torch.device:
    """The device of that name; without one the first GPU, or the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_named(name: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype of that name, `fastest` being that of `fastest_dtype`; None without a name.

    >>> dtype_named("float32", torch.device("cpu"))
    torch.float32
    """
    if name is None:
        return None
    return fastest_dtype(device) if name == "fastest" else getattr(torch, name)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it, else float32: a CPU without such units emulates it, slowly.

    Of CPUs, those with AVX512-BF16 are known to do so; ARM and Apple's GPUs are given float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def train_device(train: Mapping[str, Any]) -> torch.device:
    """The kind of device that a run with this `train:` section computes on, known before HF's arguments are made."""
    if train.get("use_cpu"):
        return torch.device("cpu")
    return torch.device("mps") if torch.backends.mps.is_available() else device_named(None)
