"""`python -m milora_eval ls`: the suites and benchmarks there are, and whether their files are in a data folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from milora_eval.suites import BENCHMARKS, SUITES, find_benchmark, has_files


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Declare the flags of `ls`."""
    options.add_argument("--data", type=Path, metavar="DIR", help="also say whether the files are there")
    options.add_argument("--format", choices=("human", "json"), default="human", help="of what is printed")


def main(options: argparse.Namespace) -> int:
    """Run the command."""
    benchmarks = [_about(name, options.data) for name in BENCHMARKS]
    if options.format == "json":
        suites = {name: {"benchmarks": suite.benchmarks, "about": suite.about} for name, suite in SUITES.items()}
        sys.stdout.write(json.dumps({"suites": suites, "benchmarks": benchmarks}, indent=1) + "\n")
        return 0
    sys.stdout.write("suites\n")
    for name, suite in SUITES.items():
        sys.stdout.write(f"  {name:14} {suite.about}\n")
    sys.stdout.write("benchmarks (read from DIR/NAME, or from DIR, with --data DIR)\n")
    for entry in benchmarks:
        there = {None: "", True: "found    ", False: "missing  "}[entry["found"]]
        files = ", ".join(name.partition("|")[0] for name in entry["files"])
        rules = " or ".join(entry["protocols"])
        sys.stdout.write(f"  {entry['name']:14} {there}{entry['split']}, {rules}: {files}\n")
    return 0


def _about(name: str, data: Path | None) -> dict[str, Any]:
    benchmark = find_benchmark(name)
    return {
        "name": name,
        "version": benchmark.version,
        "protocol": benchmark.protocol,
        "protocols": list(benchmark.protocols),
        "split": benchmark.split,
        "files": list(benchmark.files),
        "found": None if data is None else has_files(benchmark, data),
    }
