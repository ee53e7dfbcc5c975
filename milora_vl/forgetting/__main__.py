"""`python -m milora_vl.forgetting`: measure forgetting on text and on answers about pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_vl.common.cli.console import next_step, run
from milora_vl.common.cli.parser import OR_ADAPTER, Command, option, positive, shared
from milora_vl.common.cli.table import show
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import base_of, holds_adapter, model_of, newest_of_unfinished, require_adapter
from milora_vl.report.page import regenerate_report
from milora_vl.report.tables import forgetting_table

PROBES = ("text", "pictures")


def _probes(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in names if name not in PROBES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PROBES)}, got {text!r}")
    return names


COMMAND = Command(
    "milora_vl.forgetting",
    "Measure what a tuned model has forgotten.",
    """\
probes (tuned model against base model, in nats per token):
  text      general text (three books of the package, or --text): the paper's metric, and the loss on the text
  pictures  answers of the base model about pictures (drawn shapes, or the LLaVA records of --data_path)

examples:
  python -m milora_vl.forgetting --model smol-llava --adapter runs/demo
  python -m milora_vl.forgetting --model runs/full --base llava-1.5-7b --on text
  python -m milora_vl.forgetting --model llava-1.5-7b --adapter runs/a --data_path other.json --image_folder images
""",
    inputs=(
        shared("model", about=OR_ADAPTER),
        shared("adapter"),
        shared("base"),
        option("--text", type=Path, nargs="+", metavar="FILE", help="text files, one document each"),
        option("--data_path", type=Path, metavar="DATA", help="LLaVA records with the questions about pictures"),
        shared("image_folder"),
    ),
    settings=(
        option("--on", type=_probes, metavar="a,b", help=f"probes to measure, from {', '.join(PROBES)} (default: all)"),
        option("--num_tokens", type=positive, default=8192, help="number of text tokens (default: %(default)s)"),
        shared("limit", about="use only the first N questions"),
        shared("template"),
        shared("batch_size", default=8),
        shared("device"),
        shared("dtype"),
    ),
    outputs=(
        shared("output_dir", about="folder for forgetting.json (default: the folder of the tuned model)"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    options.model = model_of(options.model, options.adapter, "milora_vl.forgetting", "--adapter")
    _refuse_unused(options)
    _require_trained(options)
    folder = options.output_dir or _tuned_folder(options)
    model, adapter = options.model, options.adapter
    if adapter is None and holds_adapter(Path(model)):
        model, adapter = base_of(Path(model)), Path(model)
    from milora_vl.forgetting import job

    results = job.measure(str(model), adapter, folder, options)
    if options.format == "json":
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    else:
        show(forgetting_table(results), options.format)
    sys.stderr.write(f"written: {folder / job.FILE}\n")
    regenerate_report(folder)
    base = ("--base", options.base) if options.base else ()
    next_step("milora_vl.analyze", options.adapter or options.model, *base)
    return 0


def _refuse_unused(options: argparse.Namespace) -> None:
    on = options.on or PROBES
    pictures = "pictures" in on
    uses = {
        "text": ("text" in on, "--on text"),
        "data_path": (pictures, "--on pictures"),
        "image_folder": (pictures and options.data_path is not None, "--data_path"),
        "template": (pictures, "--on pictures"),
        "limit": (pictures, "--on pictures"),
    }
    for flag, (is_used, use) in uses.items():
        if getattr(options, flag) is not None and not is_used:
            raise UserError(f"only applies with {use}", where=f"--{flag}")


def _require_trained(options: argparse.Namespace) -> None:
    """Raise UserError, before anything loads, for a folder without an adapter, or a run that has only checkpoints."""
    if options.adapter is not None:
        require_adapter(options.adapter, "--adapter", "milora_vl.forgetting", "--model", options.model, "--adapter")
        return
    folder = Path(options.model)
    base = ("--base", options.base) if options.base else ()
    newest = newest_of_unfinished(folder, "milora_vl.forgetting", *base, "--model")
    if newest:
        raise UserError("contains no finished training", code="adapter-missing", where=str(folder), hint=newest)


def _tuned_folder(options: argparse.Namespace) -> Path:
    folder: Path = options.adapter or Path(options.model)
    if not folder.is_dir():
        message = f"{options.model} is not the folder of a training, so there is nothing to compare"
        raise UserError(message, where="--model", hint="add:  --adapter FOLDER")
    return folder


if __name__ == "__main__":
    run(main)
