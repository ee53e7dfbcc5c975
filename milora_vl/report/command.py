"""`python -m milora_vl.report RUN`: (re)write the report of a run from the files in its folder, as one page.

Pictures and plots are inside the page, which loads nothing and runs no script. Plots go to plots/ too, each with a CSV.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_data.command import as_typed, parser
from milora_data.flags import shared
from milora_vl.report import run_page, wording
from milora_vl.report.page import write_page
from milora_vl.report.repeat import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; UserError for a folder that is no run. Returns the exit code."""
    options = parser(
        "python -m milora_vl.report",
        "Write report.html into a run folder, from the files there. Without an evaluation it says how to make one.",
        "examples:\n  python -m milora_vl.report runs/demo\n",
    )
    given = options.add_argument_group("input")
    given.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a training")
    shared(options.add_argument_group("output"), "format")
    chosen = options.parse_args(argv)
    content = run_page.read_run(chosen.run)
    page, summary = write_page(content), wording.summary(content)
    sys.stderr.write(summary + "\n")
    as_json = json.dumps({"page": str(page), "summary": summary}, ensure_ascii=False)
    sys.stdout.write((as_json if chosen.format == "json" else str(page)) + "\n")
    is_evaluated = any(comparison.after for comparison in content.comparisons)
    sys.stderr.write(as_typed(f"next: {commands(content).chat if is_evaluated else commands(content).evaluate}\n"))
    return 0
