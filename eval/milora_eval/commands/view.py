"""`python -m milora_eval view RUN [OTHER]`: write one HTML page to browse the answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_eval.commands.flags import PLUGIN
from milora_eval.scores.results import require_lines
from milora_eval.scores.view import page
from milora_eval.suites import import_plugins
from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.command_line import next_step, require_folder
from milora_vl.common.cli.flags import Command, option, shared
from milora_vl.common.errors import UserError

COMMAND = Command(
    "milora_eval view",
    "Write one HTML page to browse the answers of one or two runs.",
    """\
examples:
  python -m milora_eval view runs/one/eval/emoji/final
  python -m milora_eval view runs/one/eval/emoji/base runs/one/eval/emoji/final --output answers.html
""",
    inputs=(
        option("folder", type=Path, metavar="RUN", help="results folder, for example runs/one/eval/emoji/base"),
        option("other", type=Path, nargs="?", metavar="OTHER", help="second results folder to compare with"),
    ),
    settings=(PLUGIN,),
    outputs=(
        shared("limit", default=1000, about="largest number of questions on the page (default: %(default)s)"),
        option("--output", type=Path, help="HTML file to write (default: view.html in the last folder)"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the path of the page goes to stdout."""
    options = COMMAND.parse(argv)
    import_plugins(options.plugin)
    folders = [folder for folder in (options.folder, options.other) if folder is not None]
    if options.output is not None:
        require_folder(options.output.parent, "--output")
    runs = [(_name(folder, folders), require_lines(folder)) for folder in folders]
    if options.output is not None and options.output.exists():
        raise UserError(
            f"{options.output} exists already",
            code="output-exists",
            hint="nothing was written; choose another file with --output",
        )
    target = options.output or folders[-1] / "view.html"
    html, shown, total = page(runs, options.limit)
    write_text(target, html)
    summary = {"page": str(target), "questions": shown, "of": total}
    sys.stdout.write(json.dumps(summary) + "\n" if options.format == "json" else f"{target}\n")
    next_step("milora_eval", "compare", options.folder, options.other or "OTHER")
    return 0


def _name(folder: Path, folders: list[Path]) -> str:
    """Return the last part of the folder's path that differs between the folders."""
    paths = [path.resolve().parts for path in folders]
    for position in range(1, min(map(len, paths)) + 1):
        if len(folders) == 1 or len({parts[-position] for parts in paths}) > 1:
            return folder.resolve().parts[-position]
    return str(folder)
