"""`python -m milora_vl.forgetting`: what a tuned model has forgotten, on text, its base's own words and pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_data.command import next_step, parser, positive, run
from milora_data.errors import UserError
from milora_data.flags import shared
from milora_vl.report.regenerate import rewrite_report

PROBES = ("text", "samples", "pictures")
_EXAMPLES = """\
measures, all against the base model, in nats per token:
  text      general text (three books of the package, or --text): the paper's number, and the plain loss on the text
  samples   text that the base model writes itself; needs no data
  pictures  the base model's answers about pictures (drawn shapes, or --data_path of LLaVA records)
  --suite   the drop of the scores of a suite: python -m milora_eval run, before and after

examples:
  python -m milora_vl.forgetting --model smol-llava --adapter runs/demo
  python -m milora_vl.forgetting --model runs/full --base llava-1.5-7b --on text,samples
  python -m milora_vl.forgetting --model llava-1.5-7b --adapter runs/a --data_path other.json --image_folder images
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; UserError for what cannot be measured. Returns the exit code."""
    options = _options(argv)
    _refuse_unused(options)
    folder = options.output_dir or _own_folder(options)
    from milora_vl.forgetting.job import Job

    job = Job(
        model=options.model,
        adapter=options.adapter,
        base=options.base,
        probes=options.on,
        folder=folder,
        texts=options.text,
        data_path=options.data_path,
        image_folder=options.image_folder,
        num_tokens=options.num_tokens,
        limit=options.limit,
        batch_size=options.batch_size,
        seed=options.seed,
        template=options.template,
        dtype=options.dtype,
        device=options.device,
    )
    results = job.run()
    if options.suite:
        results["scores"] = job.scores(options.suite, options.data)
    if options.format == "json":
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    else:
        from milora_vl.forgetting.job import table

        sys.stdout.write(table(results))
    sys.stderr.write(f"written: {job.file}\n")
    rewrite_report(folder)
    base = ("--base", options.base) if options.base else ()
    next_step("milora_vl.analyze", options.adapter or options.model, *base)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("python -m milora_vl.forgetting", "Measure what a tuned model has forgotten.", _EXAMPLES)
    given = options.add_argument_group("input")
    shared(given, "model", required=True)
    shared(given, "adapter")
    shared(given, "base")
    given.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="text files, a document each")
    given.add_argument("--data_path", type=Path, metavar="DATA", help="LLaVA records whose questions are asked")
    shared(given, "image_folder")
    shared(given, "suite", about="evaluate a suite too, before and after; see: python -m milora_eval ls")
    shared(given, "data", about="with the suite's files")
    settings = options.add_argument_group("settings")
    settings.add_argument("--on", type=_probes, metavar="a,b", help=f"of {', '.join(PROBES)} (default: all)")
    settings.add_argument("--num_tokens", type=positive, default=8192, help="of text (default: %(default)s)")
    shared(settings, "limit", about="the first N questions, or items of a benchmark")
    shared(settings, "template")
    shared(settings, "batch_size", default=8)
    shared(settings, "seed", about="of the samples (default: %(default)s)")
    shared(settings, "device")
    shared(settings, "dtype")
    out = options.add_argument_group("output")
    shared(out, "output_dir", about="for forgetting.json (default: the tuned folder)")
    shared(out, "format")
    parsed: argparse.Namespace = options.parse_args(argv)
    return parsed


def _refuse_unused(options: argparse.Namespace) -> None:
    """UserError for a flag that what is measured has no use for."""
    on = options.on or PROBES
    pictures = "pictures" in on
    uses = {
        "text": ("text" in on, "--on text"),
        "data_path": (pictures, "--on pictures"),
        "image_folder": (pictures and options.data_path is not None, "--data_path"),
        "template": (pictures, "--on pictures"),
        "data": (options.suite is not None, "--suite"),
        "limit": (pictures or options.suite is not None, "--on pictures or --suite"),
    }
    for flag, (is_used, use) in uses.items():
        if getattr(options, flag) is not None and not is_used:
            raise UserError(f"--{flag} has no use here: it goes with {use}")


def _probes(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in names if name not in PROBES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PROBES)}, got {text!r}")
    return names


def _own_folder(options: argparse.Namespace) -> Path:
    if options.adapter is not None and not options.adapter.is_dir():
        raise UserError(f"{options.adapter} is no folder: --adapter takes that of an adapter or a training")
    folder: Path = options.adapter or Path(options.model)
    if not folder.is_dir():
        raise UserError(f"{options.model} is no folder of a training: nothing is forgotten\nsay:  --adapter A")
    return folder


if __name__ == "__main__":
    run(main)
