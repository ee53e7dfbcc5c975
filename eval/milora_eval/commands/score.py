"""`python -m milora_eval score`: score stored answers again, without a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_eval.answers.store import PREDICTIONS
from milora_eval.commands.flags import PLUGIN
from milora_eval.registry import import_plugins
from milora_eval.scores.exports import export
from milora_eval.scores.table import score, write_table
from milora_vl.common.cli.console import next_step
from milora_vl.common.cli.parser import Command, option, shared
from milora_vl.common.cli.table import FORMATS, show

COMMAND = Command(
    "milora_eval score",
    "Score stored answers again, without a model.",
    """\
examples:
  python -m milora_eval score runs/one/eval/llava-paper/final
""",
    inputs=(option("folder", type=Path, metavar="PATH", help="results folder"),),
    settings=(PLUGIN,),
    outputs=(shared("format", choices=FORMATS),),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    import_plugins(options.plugin)
    path = options.folder.parent if options.folder.name == PREDICTIONS else options.folder
    results, table = score(path), write_table(path)
    if options.format == "json":
        sys.stdout.write(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    else:
        show(table, options.format)
    for file in export(path):
        sys.stderr.write(f"written: {file}\n")
    next_step("milora_eval", "view", path)
    return 0
