"""`python -m milora_eval view RUN [OTHER]`: one HTML page to browse the answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_data.command import next_step, parser
from milora_data.errors import UserError
from milora_data.flags import shared
from milora_data.whole import write_text
from milora_eval.scores.results import require_lines
from milora_eval.scores.view import page

EXAMPLES = """\
examples:
  python -m milora_eval view runs/one/eval/emoji/final
  python -m milora_eval view runs/one/eval/emoji/base runs/one/eval/emoji/final --output answers.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the page's path goes to stdout."""
    parse = parser("python -m milora_eval view", "One HTML page to browse the answers of one run, or of two.", EXAMPLES)
    given = parse.add_argument_group("input")
    given.add_argument("folder", type=Path, metavar="RUN", help="a results folder, such as runs/one/eval/emoji/base")
    given.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="a second one to compare it with")
    out = parse.add_argument_group("output")
    shared(out, "limit", default=1000, about="questions on the page (default: %(default)s)")
    out.add_argument("--output", type=Path, help="the page (default: view.html in the last folder)")
    shared(out, "format")
    options = parse.parse_args(argv)
    folders = [folder for folder in (options.folder, options.other) if folder is not None]
    runs = [(_name(folder, folders), require_lines(folder)) for folder in folders]
    if options.output is not None and options.output.exists():
        raise UserError(f"{options.output} exists already\nnothing was written; name a new file with --output")
    target = options.output or folders[-1] / "view.html"
    made = page(runs, options.limit)
    write_text(target, made.html)
    found = {"page": str(target), "questions": made.shown, "of": made.total}
    sys.stdout.write(json.dumps(found) + "\n" if options.format == "json" else f"{target}\n")
    if made.shown < min(made.total, options.limit):
        sys.stderr.write(f"the page holds {made.shown:,} of {made.total:,} questions: no page is larger than 5 MB\n")
    next_step("milora_eval", "compare", options.folder, options.other or "OTHER")
    return 0


def _name(folder: Path, folders: list[Path]) -> str:
    """Return the last part of a folder's path in which it differs from the others."""
    parts = [path.resolve().parts for path in folders]
    for place in range(1, min(map(len, parts)) + 1):
        if len(folders) == 1 or len({own[-place] for own in parts}) > 1:
            return folder.resolve().parts[-place]
    return str(folder)
