"""`python -m milora_vl.analyze MODEL_OR_ADAPTER`: the spectra of a model, or what a training changed in its weights.

`analyze ranks MODEL` writes a policy whose ranks follow from the spectra.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from milora_vl.common.cli.console import next_step, run
from milora_vl.common.cli.parser import Command, option, positive, share, shared
from milora_vl.common.cli.table import Table, show
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import holds_adapter, newest_of_unfinished
from milora_vl.report.page import regenerate_report

COMMAND = Command(
    "milora_vl.analyze",
    "Analyse the weights of a model, or what a training changed in them.",
    """\
model:         spectrum of each layer, the share of its energy in the minor part, effective rank (exp of the
               entropy of sigma / sum sigma), stable rank, decay exponent, condition number
training:      ||dW||, amplification factor, subspace similarity with W's top, bottom and random vectors
               (arXiv:2406.09044), intruder dimensions (arXiv:2410.21228), distance of A and B from their start.
               A lower amplification factor alone does not show that more was preserved.

examples:
  python -m milora_vl.analyze llava-1.5-7b --output_dir spectra --device cuda
  python -m milora_vl.analyze runs/demo                                  # an adapter; files go to runs/demo/analysis
  python -m milora_vl.analyze runs/full --base smol-llava --modules '*layers.1*'
  python -m milora_vl.analyze ranks --help                               # a policy with ranks from the spectra
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
            help="rank of the minor part for modules without an adapter (default: %(default)s)",
        ),
        shared("device"),
        shared("allow_base_mismatch"),
    ),
    outputs=(
        shared("output_dir", about="output folder (default for a training: analysis/ in its folder)"),
        shared("format"),
    ),
)

RANKS = Command(
    "milora_vl.analyze ranks",
    "Write a policy whose ranks follow from the singular values of a model.",
    """\
The policy selects the modules; its own ranks do not count. The scale alpha/rank of each module stays.

examples:
  python -m milora_vl.analyze ranks llava-1.5-7b --energy 0.01 --max 256 > policy.yaml
  python -m milora_vl.analyze ranks llava-1.5-7b --budget 20000000 --policy rules.yaml > policy.yaml
  python -m milora_vl.train --model llava-1.5-7b --policy policy.yaml --dry-run
""",
    inputs=(
        option("model", metavar="MODEL", help="name, hub id or folder"),
        (
            option("--energy", type=share, metavar="X", help="largest rank whose minor part holds this share of ‖W‖²"),
            option(
                "--threshold",
                type=share,
                metavar="X",
                help="number of singular values that are at most this share of the largest",
            ),
            option("--budget", type=positive, metavar="N", help="number of trained parameters of all adapters"),
        ),
        option("--policy", metavar="RULES", help="YAML text or file (default: the default policy)"),
    ),
    settings=(
        option("--min", type=positive, default=1, metavar="N", help="smallest rank (default: %(default)s)"),
        option("--max", type=positive, metavar="N", help="largest rank"),
        option("--factor_cache", type=Path, metavar="FOLDER", help="folder that caches the singular values"),
        shared("device"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    is_ranks = words[:1] == ["ranks"]
    options = RANKS.parse(words[1:]) if is_ranks else COMMAND.parse(words)
    from milora_vl.analyze import figures, layers, ranks

    if is_ranks:
        ranks.write_ranks(options)
        next_step("milora_vl.train", "--model", options.model, "--policy", "POLICY.yaml", "--dry-run")
        return 0
    subject = Path(options.subject)
    base = ("--base", options.base) if options.base else ()
    newest = newest_of_unfinished(subject, "milora_vl.analyze", *base)
    if newest:
        raise UserError("contains no finished training", code="adapter-missing", where=str(subject), hint=newest)
    is_trained = holds_adapter(subject) or options.base is not None
    folder = options.output_dir or (subject / "analysis" if is_trained and subject.is_dir() else None)
    if folder is None:
        message = f"{options.subject} is not the folder of a training: name a folder for the analysis"
        raise UserError(message, where="--output_dir", hint="for example:  --output_dir analysis")
    base_name, found = layers.layers_of(options.subject, options.base, allow_base_mismatch=options.allow_base_mismatch)
    chosen = [layer for layer in found if options.modules is None or fnmatch(layer.path, options.modules)]
    if not chosen:
        hint = f"there are {len(found):,} layers, for example {found[0].path}"
        raise UserError(f"no layer matches {options.modules}", where="--modules", hint=hint)
    of = {"subject": options.subject, "base": base_name, "rank": options.rank, "modules": options.modules}
    files = {"files": [layers.stamps(subject), layers.stamps(Path(base_name))]}
    rows = layers.rows_of(chosen, folder, of | files, options.device, options.rank)
    summary = figures.write(folder, of, rows)
    if options.format == "json":
        without_sigma = [{key: value for key, value in row.items() if key != "sigma"} for row in rows]
        sys.stdout.write(json.dumps(summary | {"rows": without_sigma}, ensure_ascii=False) + "\n")
    else:
        table = summary["table"]
        header, *columns = zip(table["header"], *table["rows"], strict=True)  # transposed: few parts, many measures
        show(Table(header, tuple(columns), table["caption"]), options.format)
    sys.stderr.write(f"layers:  {folder / 'layers.csv'}\nfigures: {folder}/*.png\n")
    regenerate_report(folder.parent)
    if not is_trained:
        next_step("milora_vl.train", "--model", options.subject, "--dry-run")
    elif holds_adapter(subject):
        next_step("milora_vl.forgetting", "--model", base_name, "--adapter", subject)
    else:
        next_step("milora_vl.forgetting", "--model", subject, "--base", base_name)
    return 0


if __name__ == "__main__":
    run(main)
