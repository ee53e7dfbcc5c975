"""`python -m milora_eval ls`: list the suites and benchmarks, and whether their files are in a data folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from milora_eval.registry import SUITES, listing
from milora_vl.common.cli.console import next_step
from milora_vl.common.cli.parser import Command, shared
from milora_vl.common.errors import UserError, no_folder

COMMAND = Command(
    "milora_eval ls",
    "List suites and benchmarks.",
    """\
examples:
  python -m milora_eval ls
  python -m milora_eval ls --data playground/data/eval --format json
""",
    inputs=(shared("data", about="data folder to search for the benchmark files"),),
    outputs=(shared("format"),),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    if options.data and not options.data.is_dir():
        raise UserError(problems=[no_folder(options.data, "--data")])
    listed = listing(options.data)
    if options.format == "json":
        sys.stdout.write(json.dumps(listed, indent=1) + "\n")
    else:
        _print(listed["benchmarks"])
    data = options.data or "FOLDER"
    next_step("milora_eval", "run", "--model", "MODEL", "--suite", "quick", "--data", data, "--output_dir", "FOLDER")
    return 0


def _print(benchmarks: Sequence[dict[str, Any]]) -> None:
    sys.stdout.write("suites\n")
    for name, suite in SUITES.items():
        sys.stdout.write(f"  {name:14} {suite.about}\n")
    sys.stdout.write("benchmarks (with --data DIR, files are read from DIR/NAME or DIR)\n")
    for entry in benchmarks:
        status = {None: "", True: "found    ", False: "missing  "}[entry["found"]]
        files = ", ".join(name.partition("|")[0] for name in entry["files"])
        rules = " or ".join(entry["protocols"])
        sys.stdout.write(f"  {entry['name']:14} {status}{entry['split']}, {rules}: {files}\n")
