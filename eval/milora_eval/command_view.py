"""`python -m milora_eval view RUN [OTHER]`: one HTML page to browse the answers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from milora_data.command import positive
from milora_eval.results import require_lines
from milora_eval.store import write_whole
from milora_eval.view import page


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Declare the arguments of `view`."""
    options.add_argument("folder", type=Path, metavar="RUN", help="a results folder, such as runs/one/eval/emoji/base")
    options.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="a second one to compare it with")
    options.add_argument("--output", type=Path, metavar="FILE", help="the page (default: view.html in the last folder)")
    options.add_argument(
        "--limit", type=positive, default=1000, metavar="N", help="questions on the page (default: %(default)s)"
    )


def main(options: argparse.Namespace) -> int:
    """Run the command; the page's path goes to stdout."""
    folders = [folder for folder in (options.folder, options.other) if folder is not None]
    runs = [(_name(folder, folders), require_lines(folder)) for folder in folders]
    target = options.output or folders[-1] / "view.html"
    made = page(runs, options.limit)
    write_whole(target, made.html)
    sys.stdout.write(f"{target}\n")
    if made.shown < min(made.total, options.limit):
        sys.stderr.write(f"the page holds {made.shown:,} of {made.total:,} questions: no page is larger than 5 MB\n")
    return 0


def _name(folder: Path, folders: list[Path]) -> str:
    """Return the last part of a folder's path in which it differs from the others."""
    parts = [path.resolve().parts for path in folders]
    for place in range(1, min(map(len, parts)) + 1):
        if len(folders) == 1 or len({own[-place] for own in parts}) > 1:
            return folder.resolve().parts[-place]
    return str(folder)
