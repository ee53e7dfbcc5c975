"""`python -m milora_eval score FOLDER`: score stored answers again, without a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from milora_eval.evaluate import write_table
from milora_eval.results import require_lines, score


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Declare the arguments of `score`."""
    options.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a results folder, such as runs/one/eval/emoji/final"
    )
    options.add_argument("--format", choices=("human", "json"), default="human", help="of what is printed")


def main(options: argparse.Namespace) -> int:
    """Run the command: results.json and table.md are written anew."""
    require_lines(options.folder)
    results = score(options.folder)
    table = write_table(options.folder)
    if options.format == "json":
        sys.stdout.write(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
        return 0
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table.rich())
    return 0
