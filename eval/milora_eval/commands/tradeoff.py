"""`python -m milora_eval tradeoff BASE RUN...`: the gain on the targets against the change on everything held out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

from milora_eval.commands.flags import PLUGIN
from milora_eval.scores.tradeoff import read_evaluation, tradeoff
from milora_eval.scores.tradeoff_report import CSV_HEADER, csv_rows, figure, table
from milora_eval.suites import import_plugins
from milora_vl.common.cli.command_line import next_step
from milora_vl.common.cli.flags import Command, flag, option, shared
from milora_vl.common.cli.table import FORMATS, show
from milora_vl.report.plots import draw, write_csv

FILE = "tradeoff"
COMMAND = Command(
    "milora_eval tradeoff",
    "Compare the gain on the targets of a training with the change on everything held out.",
    """\
The command reads the answers that `run` has stored. BASE and RUN are results folders (eval/SUITE/WHICH) or run folders.
In a run folder it reads all eval/*/base for BASE and all eval/*/final for RUN; for runs/a/checkpoint-50 it reads all
runs/a/eval/*/checkpoint-50.

examples:
  python -m milora_eval tradeoff runs/a runs/a --targets cub200
  python -m milora_eval tradeoff runs/a runs/a runs/b --targets cub200 pathvqa --output_dir out
  python -m milora_eval tradeoff runs/1 runs/1 runs/2 runs/3 --sequence --targets cub200 pathvqa textvqa
""",
    inputs=(
        option("base", type=Path, metavar="BASE", help="results of the model before the training"),
        option("runs", type=Path, nargs="+", metavar="RUN", help="results after a training"),
        option(
            "--targets",
            nargs="+",
            required=True,
            metavar="NAME",
            help="benchmarks that were trained for; all others are held out",
        ),
    ),
    settings=(
        flag("--sequence", "the runs learned the targets one after another: RUN i learned target i last"),
        PLUGIN,
    ),
    outputs=(
        shared("output_dir", about=f"folder for {FILE}.csv and the plot {FILE}.png (default: print only)"),
        shared("format", choices=FORMATS),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = COMMAND.parse(argv)
    import_plugins(options.plugin)
    names = _names(options.runs)
    base = read_evaluation(options.base, "base", "the base")
    runs = [read_evaluation(folder, "final", name) for folder, name in zip(options.runs, names, strict=True)]
    result = tradeoff(base, runs, options.targets, sequence=options.sequence)
    if options.format == "json":
        sys.stdout.write(json.dumps(asdict(result), indent=1) + "\n")
    else:
        show(table(result), options.format)
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        write_csv(options.output_dir / f"{FILE}.csv", CSV_HEADER, list(csv_rows(result)))
        draw(options.output_dir, FILE, figure(result), "gain on the targets over the change on what is held out")
        written = (options.output_dir / f"{FILE}{ending}" for ending in (".csv", ".png"))
        sys.stderr.write(f"written: {', '.join(map(str, written))}\n")
    next_step("milora_eval", "view", base.folders[0], runs[-1].folders[0])
    return 0


def _names(folders: Sequence[Path]) -> list[str]:
    """Return what differs between the paths of the runs; a single run keeps its path."""
    parts = [folder.resolve().parts for folder in folders]
    start = _num_equal(parts)
    end = _num_equal([each[start:][::-1] for each in parts])
    names = ["/".join(each[start : len(each) - end]) for each in parts]
    return names if len(set(names)) == len(names) > 1 and all(names) else list(map(str, folders))


def _num_equal(parts: Sequence[Sequence[str]]) -> int:
    """Return how many parts all have in common at their start."""
    return sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
