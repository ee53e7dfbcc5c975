"""`python -m milora_eval compare BASE RUN...`: paired differences of evaluations of the same questions."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from milora_eval.commands.flags import PLUGIN, names_of
from milora_eval.registry import import_plugins
from milora_eval.scores.compare import ModelAnswers, Pair, compare, compare_runs, named_like, read_evaluation
from milora_eval.scores.table import pairs_table, runs_table
from milora_vl.common.cli.console import next_step
from milora_vl.common.cli.parser import Command, option, shared
from milora_vl.common.cli.table import FORMATS, show

COMMAND = Command(
    "milora_eval compare",
    "Compute paired differences of evaluations of the same questions.",
    """\
The command reads the answers that `run` has stored. BASE and RUN are results folders (eval/SUITE/WHICH) or run folders.
In a run folder it reads all eval/*/base for BASE and all eval/*/final for RUN; for runs/a/checkpoint-50 it reads all
runs/a/eval/*/checkpoint-50. One RUN without --targets shows all metrics; else the table has the headlines and means.

examples:
  python -m milora_eval compare runs/a/eval/llava-paper/final runs/b/eval/llava-paper/final
  python -m milora_eval compare runs/a runs/a runs/b --targets cub200 pathvqa --format latex
""",
    inputs=(
        option("base", type=Path, metavar="BASE", help="results to compare with; differences are RUN minus BASE"),
        option("runs", type=Path, nargs="+", metavar="RUN", help="results folder, or run folder"),
    ),
    settings=(
        option(
            "--targets",
            nargs="+",
            default=[],
            metavar="NAME",
            help="benchmarks that were trained for; all others are held out",
        ),
        PLUGIN,
    ),
    outputs=(shared("format", choices=FORMATS),),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    import_plugins(options.plugin)
    is_pair = len(options.runs) == 1 and not options.targets
    names = ["B"] if is_pair else names_of(options.runs)
    base = read_evaluation(options.base, "base", "A" if is_pair else "the base")
    found = (read_evaluation(folder, "final", name) for folder, name in zip(options.runs, names, strict=True))
    runs = [named_like(base, each) for each in found]
    result = compare_runs(base, runs, options.targets)
    if is_pair:
        pairs = [pair for each in compare(_lines(base), _lines(runs[0])) for pair in each.pairs]
        sys.stderr.write("".join(f"{note}\n" for note in result.notes))
        if options.format == "json":
            sys.stdout.write(json.dumps([asdict(pair) for pair in pairs], indent=1) + "\n")
        else:
            show(pairs_table(f"A {options.base}, B {options.runs[0]}", pairs, ("A", "B")), options.format)
        if options.format == "human":
            shown = [pair for pair in pairs if pair.difference is not None and not pair.b.detail]
            sys.stdout.write("".join(map(_sentence, shown)))
    elif options.format == "json":
        sys.stdout.write(json.dumps(asdict(result), indent=1) + "\n")
    else:
        show(runs_table(result), options.format)
    next_step("milora_eval", "view", options.base, options.runs[-1])
    return 0


def _lines(evaluation: ModelAnswers) -> list:
    return [line for lines in evaluation.lines.values() for line in lines]


def _sentence(pair: Pair) -> str:
    paired, scale = pair.difference, pair.b.scale
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
