"""Flags that have the same name, type and meaning in every command.

Each command groups its flags into `input`, `settings` and `output`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from milora_data.command.cli import positive, suggest


def device(text: str) -> str:
    """Parse the name of an available device: the `type` of --device."""
    import torch

    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        near = suggest(text, ("cpu", "cuda"))
        hint = f"\ndid you mean {near[0]} ?" if near else ""
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:1, ..., got {text!r}{hint}")
    backend = {"cuda": torch.cuda, "xpu": torch.xpu}.get(kind)
    available = backend.device_count() if backend else int(kind == "cpu" or torch.backends.mps.is_available())
    if (torch.device(text).index or 0) >= available:
        raise argparse.ArgumentTypeError(f"no device {text}: PyTorch finds {available or 'no'} {kind} devices")
    return text


RECORDS = "JSON, JSONL, .parquet, .tar, a folder of save_to_disk, hub:OWNER/NAME, or a mixture (.yaml)"
SHARED: dict[str, dict[str, Any]] = {
    "model": {"metavar": "MODEL", "help": "named model, hub id or folder"},
    "adapter": {"type": Path, "metavar": "FOLDER", "help": "adapter folder, for example the output_dir of a run"},
    "base": {"metavar": "MODEL", "help": "base model to compare with, if --model was trained in full"},
    "image_folder": {"type": Path, "metavar": "FOLDER", "help": "folder that picture names are relative to"},
    "suite": {"metavar": "NAME", "help": "list of benchmarks; see: python -m milora_eval ls"},
    "data": {"type": Path, "metavar": "FOLDER", "help": "folder that contains the benchmark files"},
    "template": {"metavar": "NAME", "help": "prompt format (default: the format of the run, else vicuna_v1)"},
    "limit": {"type": positive, "help": "use only the first N items"},
    "batch_size": {"type": positive, "help": "items per batch (default: %(default)s)"},
    "seed": {"type": int, "default": 0, "help": "random seed (default: %(default)s)"},
    "device": {
        "type": device,
        "metavar": "DEVICE",
        "help": "cpu, cuda, cuda:1, ... (default: cuda if available)",
    },
    "dtype": {
        "choices": ("float32", "bfloat16", "float16", "fastest"),
        "help": "data type of the weights (default: float32 on a CPU); fastest: bfloat16 if the device supports it",
    },
    "output_dir": {"type": Path, "metavar": "FOLDER", "help": "output folder"},
    "format": {"choices": ("human", "json"), "default": "human", "help": "output format (default: %(default)s)"},
}


def shared(
    group: argparse._ActionsContainer,
    name: str,
    *,
    about: str | None = None,
    required: bool = False,
    default: Any = None,
    choices: tuple[str, ...] | None = None,
) -> None:
    """Add a flag of `SHARED` to `group`; `about`, `default` and `choices` override the shared values."""
    overrides = {"help": about, "default": default, "choices": choices}
    options = SHARED[name] | {key: value for key, value in overrides.items() if value is not None}
    group.add_argument(f"--{name}", required=required, **options)
