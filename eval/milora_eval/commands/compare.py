"""`python -m milora_eval compare A B`: paired differences of two evaluations of the same items."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from milora_data.command import next_step, parser
from milora_data.flags import shared
from milora_eval.scores.compare import Pair, compare, num_common
from milora_eval.scores.results import require_lines
from milora_eval.scores.table import FORMATS, pairs_table, show

EXAMPLES = """\
examples:
  python -m milora_eval compare runs/a/eval/llava-paper/final runs/b/eval/llava-paper/final
  python -m milora_eval compare runs/a/eval/emoji/base runs/a/eval/emoji/final --format latex
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parse = parser(
        "python -m milora_eval compare", "Paired differences of two evaluations of the same items.", EXAMPLES
    )
    given = parse.add_argument_group("input")
    given.add_argument("a", type=Path, metavar="A", help="a results folder, such as runs/one/eval/emoji/final")
    given.add_argument("b", type=Path, metavar="B", help="another one; differences are B minus A")
    shared(parse.add_argument_group("output"), "format", choices=FORMATS)
    options = parse.parse_args(argv)
    a, b = require_lines(options.a), require_lines(options.b)
    pairs, common = compare(a, b), num_common(a, b)
    if common < max(len(a), len(b)):
        sys.stderr.write(f"compared on the {common:,} items that both have (A {len(a):,}, B {len(b):,})\n")
    if options.format == "json":
        sys.stdout.write(json.dumps([asdict(pair) for pair in pairs], indent=1) + "\n")
    else:
        show(pairs_table(f"A {options.a}, B {options.b}", pairs, ("A", "B")), options.format)
    if options.format == "human":
        shown = [pair for pair in pairs if pair.difference is not None and not pair.b.detail]
        sys.stdout.write("".join(map(_sentence, shown)))
    next_step("milora_eval", "view", options.a, options.b)
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
