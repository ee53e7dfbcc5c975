"""`python -m milora_eval compare A B`: compute paired differences of two evaluations of the same items."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from milora_eval.commands.flags import PLUGIN
from milora_eval.scores.compare import Pair, compare, num_common
from milora_eval.scores.results import require_lines
from milora_eval.scores.table import pairs_table
from milora_eval.suites import import_plugins
from milora_vl.common.cli.command_line import next_step
from milora_vl.common.cli.flags import Command, option, shared
from milora_vl.common.cli.table import FORMATS, show

COMMAND = Command(
    "milora_eval compare",
    "Compute paired differences of two evaluations of the same items.",
    """\
examples:
  python -m milora_eval compare runs/a/eval/llava-paper/final runs/b/eval/llava-paper/final
  python -m milora_eval compare runs/a/eval/emoji/base runs/a/eval/emoji/final --format latex
""",
    inputs=(
        option("a", type=Path, metavar="A", help="results folder, for example runs/one/eval/emoji/final"),
        option("b", type=Path, metavar="B", help="second results folder; differences are B minus A"),
    ),
    settings=(PLUGIN,),
    outputs=(shared("format", choices=FORMATS),),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = COMMAND.parse(argv)
    import_plugins(options.plugin)
    a, b = require_lines(options.a), require_lines(options.b)
    pairs, common = compare(a, b), num_common(a, b)
    if common < max(len(a), len(b)):
        sys.stderr.write(f"comparing the {common:,} items that both have (A {len(a):,}, B {len(b):,})\n")
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
    paired, scale = pair.difference, 100.0 if pair.b.unit == "fraction" else 1.0
    assert paired is not None
    between = ""
    if paired.low is not None and paired.high is not None:
        between = f", 95 % interval {scale * paired.low:+.1f} to {scale * paired.high:+.1f}"
    more = [] if paired.p_value is None else [f"McNemar p = {paired.p_value:.2g}"]
    more += [] if paired.p_bootstrap is None else [f"bootstrap p = {paired.p_bootstrap:.2g}"]
    more += [paired.note] if paired.note else []
    return (
        f"{pair.benchmark} {pair.b.name}: B - A = {scale * paired.value:+.1f}{between}; "
        f"only A right {paired.only_a}, only B {paired.only_b}, {', '.join(more)}\n"
    )
