"""The one console script `milora`, and `python -m milora_vl`: every program of this project under one roof.

`milora train ...` is `python -m milora_vl.train ...`, `milora data check ...` is `python -m milora_data check ...`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from milora_data.command import run, suggest
from milora_data.errors import UserError

# Name, module with a `main`, what it does. A module is imported only when it is asked for.
PROGRAMS = {
    "Train": {
        "train": ("milora_vl.train", "fine-tune a model with MiLoRA, LoRA and others, by flags or a recipe"),
        "compose": ("milora_vl.compose", "make a LLaVA of a vision tower and a language model"),
        "report": ("milora_vl.report", "write the report of a run folder again"),
    },
    "Use": {
        "chat": ("milora_vl.chat", "ask a model about a picture"),
        "export": ("milora_vl.export", "turn an adapter into a merged model, LLaVA's layout, and back"),
    },
    "Data": {
        "data": ("milora_data.__main__", "check, convert, show and count a data set"),
    },
    "Evaluate": {
        "eval": ("milora_eval.__main__", "benchmarks: run, score, compare, view"),
        "forgetting": ("milora_vl.forgetting.__main__", "what a tuned model has lost, on text and pictures"),
        "analyze": ("milora_vl.analyze", "spectra of a model, and what a training changed in its weights"),
        "sweep": ("milora_vl.sweep.__main__", "methods, learning rates, ranks and seeds compared fairly"),
    },
}
MODULES = {name: module for programs in PROGRAMS.values() for name, (module, _) in programs.items()}

EXAMPLES = """\
examples:
  milora train --model llava-1.5-7b --dry-run
  milora data check train.json --image_folder images
  milora eval run --model llava-1.5-7b --adapter runs/a --suite llava-paper --data eval --output_dir runs/a
"""


def usage() -> str:
    """Return the text of `--help`."""
    groups = "\n\n".join(
        "\n".join([f"{group}:", *(f"  {name:<10} {about}" for name, (_, about) in programs.items())])
        for group, programs in PROGRAMS.items()
    )
    return (
        "usage: milora PROGRAM ...          (or: python -m milora_vl PROGRAM ...)\n\n"
        f"{groups}\n\noptions of a program: milora PROGRAM --help\n\n{EXAMPLES}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one program and return its exit code; UserError for a name that is none."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        raise UserError("no program given\n" + usage().rstrip())
    name = arguments[0]
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if name not in MODULES:
        near = suggest(name, MODULES)
        hint = f"\ndid you mean {near[0]} ?" if near else ""
        raise UserError(f"unknown program: {name}\nexpected one of: {', '.join(MODULES)}{hint}")
    return int(import_module(MODULES[name]).main(arguments[1:]))


def console() -> None:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    console()
