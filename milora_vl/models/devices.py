"""Devices, dtypes and quantization by the names of flags and recipes (`--device`, `--dtype fastest`), LLaVA's `--bits`.

A quantised base: initial factors come from the dequantised weight, and an adapter does not change the base, so step 0
equals the quantised base.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.matrices import is_linear

Quantization = Literal["4bit", "8bit"]


def device_named(name: str | None) -> torch.device:
    """Return the device of that name; by default the GPU, else the CPU. Apple's GPU has to be named."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(name) if name else gpu if gpu is not None and gpu.type != "mps" else torch.device("cpu")


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


def unquantized(model: nn.Module) -> tuple[str, ...]:
    """Return the starts of the paths that quantisation leaves out: head, projector and vision tower, as in LLaVA.

    transformers matches them from the start of a path.
    """
    roots = find_towers(model).roots
    return tuple(dict.fromkeys(["lm_head", *roots.get("projector", ()), *roots.get("vision", ())]))


def quantized_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers of a model that quantisation packs.

    >>> from milora_vl.models.tiny import tiny_llava
    >>> quantized_layers(tiny_llava()[0])[0]
    'model.language_model.layers.0.self_attn.q_proj'
    """
    kept = unquantized(model)
    return [path for path, module in model.named_modules() if is_linear(module) and not path.startswith(kept)]


def bytes_per_number(quantization: Quantization) -> float:
    """Return the bytes per packed weight; 4 bits add a constant of one byte per 64 numbers, and 4 bytes per 256 of it.

    >>> round(bytes_per_number("4bit"), 3)
    0.516
    """
    return 1.0 if quantization == "8bit" else 0.5 + (1 + 4 / 256) / 64


def quantization_config(
    quantization: Quantization, kept: Sequence[str], *, compute_dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Return the BitsAndBytesConfig of a quantised base; 4 bits are NF4 with double quantisation, as in LLaVA.

    `kept` is what `unquantized` returns for the model. `compute_dtype` applies to 4 bits (arXiv:2305.14314).
    """
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(kept))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(kept),
    )


def measured_flops(size: int = 1024, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)  # slower ones waited for other programs
