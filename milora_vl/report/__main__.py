"""`python -m milora_vl.report RUN`: write the report of a run from the files in its folder, as one page.

The page contains all pictures and plots; it loads no other file and runs no script. plots/ gets each plot.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_vl.common.cli.console import run
from milora_vl.common.cli.parser import Command, option, shared
from milora_vl.common.errors import expected_format
from milora_vl.report.page import summary, write_page
from milora_vl.report.read_run import RESTORE, read_run
from milora_vl.report.repeat import commands

COMMAND = Command(
    "milora_vl.report",
    "Write report.html into a run folder from the files in it. It names the command of a missing evaluation.",
    "examples:\n  python -m milora_vl.report runs/demo\n",
    inputs=(option("run", type=Path, metavar="RUN", help="output_dir of a training"),),
    outputs=(shared("format"),),
)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = COMMAND.parse(argv)
    message = "a file does not have the format that a training writes"
    with expected_format(message, code="run-folder-damaged", where=str(chosen.run), hint=RESTORE):
        content = read_run(chosen.run)
        page, result = write_page(content), summary(content)
    sys.stderr.write(result + "\n")
    as_json = json.dumps({"page": str(page), "summary": result}, ensure_ascii=False)
    sys.stdout.write((as_json if chosen.format == "json" else str(page)) + "\n")
    is_evaluated, typed = any(comparison.after for comparison in content.comparisons), commands(content)
    sys.stderr.write(f"next: {typed.chat if is_evaluated else typed.evaluate}\n")
    return 0


if __name__ == "__main__":
    run(main)
