"""How a command declares its flags (`Command`), and the flags that several commands share (`SHARED`)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_vl.common.cli.command_line import count, did_you_mean, from_zero, parser, positive, require_folder, suggest
from milora_vl.common.errors import UserError


def device(text: str) -> str:
    """Parse the name of an available device: the `type` of --device."""
    import torch

    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        hint = did_you_mean(suggest(text, ("cpu", "cuda"))[:1])
        raise UserError(f"expected cpu, cuda, cuda:1, ..., got {text!r}", code="flag-value", hint=hint)
    backend = {"cuda": torch.cuda, "xpu": torch.xpu}.get(kind)
    available = backend.device_count() if backend else int(kind == "cpu" or torch.backends.mps.is_available())
    if (torch.device(text).index or 0) >= available:
        message = f"no device {text}: PyTorch finds {available or 'no'} {kind} devices"
        raise UserError(message, code="flag-value", hint="to run on the CPU:  --device cpu")
    return text


RECORDS = "JSON, JSONL, .parquet, .tar, a folder of save_to_disk, hub:OWNER/NAME, or a mixture (.yaml)"
OR_ADAPTER = "named model, hub id or folder (default: the base of --adapter)"
SHARED: dict[str, dict[str, Any]] = {
    "model": {"metavar": "MODEL", "help": "named model, hub id or folder"},
    "adapter": {"type": Path, "metavar": "FOLDER", "help": "adapter folder, for example the output_dir of a run"},
    "base": {"metavar": "MODEL", "help": "base model to compare with, if --model was trained in full"},
    "scale": {
        "type": from_zero,
        "default": 1.0,
        "help": "size of the finished update: 1 as trained, 0.5 half of it, 0 none (default: 1)",
    },
    "image_folder": {"type": Path, "metavar": "FOLDER", "help": "folder that picture names are relative to"},
    "suite": {"metavar": "NAME", "help": "list of benchmarks, or FILE.json with own questions"},
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
    "image_tokens": {"type": count, "default": 576, "help": "tokens per picture (default: %(default)s)"},
    "allow_base_mismatch": {"action": "store_true", "help": "continue with another base model"},
    "retry": {"action": "store_true", "help": "run failed cells again"},
    "format": {"choices": ("human", "json"), "default": "human", "help": "output format (default: %(default)s)"},
}


@dataclass(frozen=True, slots=True)
class Option:
    """One argument of a command: its names and the keywords of argparse's `add_argument`."""

    names: tuple[str, ...]
    keywords: Mapping[str, Any]


Choice = tuple[Option, ...]
"""Exactly one of these options is required."""


def option(*names: str, **keywords: Any) -> Option:
    """Return an option; it takes the arguments of argparse's `add_argument`."""
    return Option(names, keywords)


def flag(name: str, about: str) -> Option:
    """Return a flag without a value."""
    return option(name, action="store_true", help=about)


DATA = option("data", type=Path, metavar="DATA", help=RECORDS)


def shared(
    name: str,
    *,
    about: str | None = None,
    required: bool = False,
    default: Any = None,
    choices: tuple[str, ...] | None = None,
) -> Option:
    """Return a flag of `SHARED`; `about`, `default` and `choices` override the shared values."""
    overrides = {"help": about, "default": default, "choices": choices}
    keywords = SHARED[name] | {key: value for key, value in overrides.items() if value is not None}
    return option(f"--{name}", **keywords, **({"required": True} if required else {}))


@dataclass(frozen=True, slots=True)
class Command:
    """The declaration of a program or a subcommand: its name after `python -m`, one sentence, examples, and its flags.

    `--help` shows the flags in three groups. Exactly one of the flags in a `Choice` is required.
    """

    name: str
    about: str
    examples: str
    inputs: Sequence[Option | Choice] = ()
    settings: Sequence[Option] = ()
    outputs: Sequence[Option] = ()

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse the arguments (default: the command line of the process).

        Raises UserError for a mistake in them, also if nothing can be written to --output_dir.
        """
        options = parser(f"python -m {self.name}", self.about, self.examples)
        for title, members in (("input", self.inputs), ("settings", self.settings), ("output", self.outputs)):
            group = options.add_argument_group(title)
            for member in members:
                if isinstance(member, Option):
                    group.add_argument(*member.names, **member.keywords)
                    continue
                choice = group.add_mutually_exclusive_group(required=True)
                for each in member:
                    choice.add_argument(*each.names, **each.keywords)
        parsed: argparse.Namespace = options.parse_args(argv)
        if "output_dir" in parsed and parsed.output_dir is not None:
            require_folder(parsed.output_dir)
        return parsed
