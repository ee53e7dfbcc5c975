"""`python -m milora_vl.analyze MODEL_OR_ADAPTER`: what a training changed in the weights of its base."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from milora_vl.common.cli.console import next_step, run
from milora_vl.common.cli.parser import Command, option, positive, shared
from milora_vl.common.cli.table import Table, show
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import holds_adapter, newest_of_unfinished
from milora_vl.report.page import regenerate_report

COMMAND = Command(
    "milora_vl.analyze",
    "Analyse what a training changed in the weights of its base.",
    """\
For each layer: ||dW||, amplification factor, subspace similarity with W's top, bottom and random vectors
(arXiv:2406.09044), intruder dimensions (arXiv:2410.21228), distance of A and B from their start.
A lower amplification factor alone does not show that more was preserved.

examples:
  python -m milora_vl.analyze runs/demo                                  # an adapter; files go to runs/demo/analysis
  python -m milora_vl.analyze runs/full --base smol-llava --modules '*layers.1*'
""",
    inputs=(
        option("subject", metavar="MODEL_OR_ADAPTER", help="name, hub id or folder"),
        shared("base", about="base model; required for a full model (default: the one the adapter names)"),
        option("--modules", metavar="GLOB", help="only layers whose path matches"),
    ),
    settings=(
        option(
            "--rank",
            type=positive,
            default=128,
            help="directions of a change in full that are compared (default: %(default)s)",
        ),
        shared("device"),
        shared("allow_base_mismatch"),
    ),
    outputs=(
        shared("output_dir", about="output folder (default for a training: analysis/ in its folder)"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(sys.argv[1:] if argv is None else argv)
    from milora_vl.analyze import figures, layers

    subject = Path(options.subject)
    base = ("--base", options.base) if options.base else ()
    newest = newest_of_unfinished(subject, "milora_vl.analyze", *base)
    if newest:
        raise UserError("contains no finished training", code="adapter-missing", where=str(subject), hint=newest)
    is_adapter = holds_adapter(subject)
    if not is_adapter and options.base is None:
        message = f"{options.subject} is not the folder of an adapter"
        raise UserError(message, where=str(subject), hint="name the model before the training:  --base MODEL")
    folder = options.output_dir or (subject / "analysis" if subject.is_dir() else None)
    if folder is None:
        message = f"{options.subject} is not the folder of a training: name a folder for the analysis"
        raise UserError(message, where="--output_dir", hint="for example:  --output_dir analysis")
    base_name, found = layers.layers_of(options.subject, options.base, allow_base_mismatch=options.allow_base_mismatch)
    chosen = [layer for layer in found if options.modules is None or fnmatch(layer.path, options.modules)]
    if not chosen:
        hint = f"there are {len(found):,} layers, for example {found[0].path}"
        raise UserError(f"no layer matches {options.modules}", where="--modules", hint=hint)
    of = {"subject": options.subject, "base": base_name, "rank": options.rank, "modules": options.modules}
    store = folder / "unfinished.jsonl"
    rows = layers.rows_of(chosen, options.device, options.rank, store)
    summary = figures.write(folder, of, rows)
    store.unlink()
    if options.format == "json":
        sys.stdout.write(json.dumps(summary | {"rows": rows}, ensure_ascii=False) + "\n")
    else:
        table = summary["table"]
        header, *columns = zip(table["header"], *table["rows"], strict=True)  # transposed: few parts, many measures
        show(Table(header, tuple(columns), table["caption"]), options.format)
    sys.stderr.write(f"layers:  {folder / 'layers.csv'}\nfigures: {folder}/*.png\n")
    regenerate_report(folder.parent)
    if is_adapter:
        next_step("milora_vl.forgetting", "--model", base_name, "--adapter", subject)
    else:
        next_step("milora_vl.forgetting", "--model", subject, "--base", base_name)
    return 0


if __name__ == "__main__":
    run(main)
