"""Flags that mean the same in every command: one name, one kind of value, one sentence.

A command's flags stand in the groups `input`, `settings` and `output`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from milora_data.command import positive, suggest


def device(text: str) -> str:
    """Parse the name of a device that is here: the `type` of --device."""
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
    there = backend.device_count() if backend else int(kind == "cpu" or torch.backends.mps.is_available())
    if (torch.device(text).index or 0) >= there:
        found = f"{there} of its kind" if there else "none of its kind"
        raise argparse.ArgumentTypeError(f"no device {text} here: PyTorch sees {found}")
    return text


RECORDS = "JSON, JSONL, .parquet, .tar, hub:OWNER/NAME, or a mixture (.yaml)"
SHARED: dict[str, dict[str, Any]] = {
    "model": {"metavar": "MODEL", "help": "a named model, a hub id or a folder"},
    "adapter": {"type": Path, "metavar": "FOLDER", "help": "of a fine-tuning, such as a run's output_dir"},
    "base": {"metavar": "MODEL", "help": "what a fully trained --model is compared with"},
    "image_folder": {"type": Path, "metavar": "FOLDER", "help": "that the records' pictures are relative to"},
    "suite": {"metavar": "NAME", "help": "a list of benchmarks; see: python -m milora_eval ls"},
    "data": {"type": Path, "metavar": "FOLDER", "help": "with the files of the benchmarks"},
    "template": {"metavar": "NAME", "help": "prompt format (default: the run's own, else vicuna_v1)"},
    "limit": {"type": positive, "help": "the first N items"},
    "batch_size": {"type": positive, "help": "items at a time (default: %(default)s)"},
    "seed": {"type": int, "default": 0, "help": "of what is drawn (default: %(default)s)"},
    "device": {
        "type": device,
        "metavar": "DEVICE",
        "help": "cpu, cuda, cuda:1, ... (default: cuda if there is one)",
    },
    "dtype": {
        "choices": ("float32", "bfloat16", "float16", "fastest"),
        "help": "of the weights (default: float32 on a CPU); fastest: bfloat16 where the device multiplies in it",
    },
    "output_dir": {"type": Path, "metavar": "FOLDER", "help": "to write"},
    "format": {"choices": ("human", "json"), "default": "human", "help": "of what is printed (default: %(default)s)"},
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
    """Declare a flag of the table; `about` says what it is here where the table's sentence says too little."""
    given = {"help": about, "default": default, "choices": choices}
    options = SHARED[name] | {key: value for key, value in given.items() if value is not None}
    group.add_argument(f"--{name}", required=required, **options)
