"""`python -m milora_eval compare A B`: paired differences of two evaluations of the same items."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from milora_eval.compare import Pair, compare, num_common
from milora_eval.results import require_lines
from milora_eval.table import FORMATS, pairs_table, show


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Declare the arguments of `compare`."""
    options.add_argument("a", type=Path, metavar="A", help="a results folder, such as runs/one/eval/emoji/final")
    options.add_argument("b", type=Path, metavar="B", help="another one; differences are B minus A")
    options.add_argument("--format", choices=FORMATS, default="human", help="of what is printed")


def main(options: argparse.Namespace) -> int:
    """Run the command."""
    a, b = require_lines(options.a), require_lines(options.b)
    pairs, common = compare(a, b), num_common(a, b)
    if common < max(len(a), len(b)):
        sys.stderr.write(f"compared on the {common:,} items that both have (A {len(a):,}, B {len(b):,})\n")
    if options.format == "json":
        sys.stdout.write(json.dumps([asdict(pair) for pair in pairs], indent=1) + "\n")
        return 0
    table = pairs_table(f"A {options.a}, B {options.b}", pairs, ("A", "B"))
    show(table, options.format)
    if options.format == "human":
        shown = [pair for pair in pairs if pair.difference is not None and not pair.b.detail]
        sys.stdout.write("".join(map(_sentence, shown)))
        sys.stderr.write(f"next: python -m milora_eval view {options.a} {options.b}\n")
    return 0


def _sentence(pair: Pair) -> str:
    found, scale = pair.difference, 100.0 if pair.b.unit == "fraction" else 1.0
    assert found is not None
    tests = [] if found.p_value is None else [f"McNemar p = {found.p_value:.2g}"]
    tests += [] if found.p_bootstrap is None else [f"bootstrap p = {found.p_bootstrap:.2g}"]
    return (
        f"{pair.benchmark} {pair.b.name}: B - A = {scale * found.value:+.1f}, 95 % interval {scale * found.low:+.1f} "
        f"to {scale * found.high:+.1f}; only A right {found.only_a}, only B {found.only_b}, {', '.join(tests)}\n"
    )
