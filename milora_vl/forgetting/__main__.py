"""`python -m milora_vl.forgetting`: what a tuned model has forgotten, on text, its base's own words and pictures."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_data.command import parser, positive, run, say_next
from milora_data.errors import UserError

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
    if (folder / "recipe.yaml").is_file():
        _report(folder)
        say_next("milora_vl.analyze", folder)
    return 0


def _report(folder: Path) -> None:
    """Write the run's report anew; it cannot fail the measurement."""
    try:
        sys.stderr.write(f"report:  {importlib.import_module('milora_vl.report').write_report(folder)}\n")
    except UserError as error:
        sys.stderr.write(f"no report: {error}\n")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("python -m milora_vl.forgetting", "Measure what a tuned model has forgotten.", _EXAMPLES)
    options.add_argument("--model", required=True, metavar="M", help="name, hub id or folder of the model")
    options.add_argument("--adapter", type=Path, metavar="A", help="folder with the adapter")
    options.add_argument("--base", metavar="B", help="what a fully trained --model is compared with")
    options.add_argument("--on", type=_probes, default=None, metavar="a,b", help=f"of {', '.join(PROBES)}; default all")
    options.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="text files, a document each")
    options.add_argument("--data_path", type=Path, metavar="D", help="LLaVA records whose questions are asked")
    options.add_argument("--image_folder", type=Path, metavar="I", help="that their pictures are relative to")
    options.add_argument("--num_tokens", type=positive, default=8192, metavar="N", help="of text (default: 8192)")
    options.add_argument("--limit", type=positive, metavar="N", help="the first N questions, or items of a benchmark")
    options.add_argument("--suite", metavar="S", help="evaluate a suite too, before and after; see milora_eval ls")
    options.add_argument("--data", type=Path, metavar="DIR", help="folder of the suite's files")
    options.add_argument("--output_dir", type=Path, metavar="O", help="for forgetting.json; default: the tuned folder")
    options.add_argument("--template", help="prompt format (default: the run's own, else vicuna_v1)")
    options.add_argument("--batch_size", type=positive, default=8)
    options.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32 on a CPU)")
    options.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    options.add_argument("--format", choices=("human", "json"), default="human", help="of what is printed")
    parsed: argparse.Namespace = options.parse_args(argv)
    return parsed


def _probes(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in names if name not in PROBES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PROBES)}, got {text!r}")
    return names


def _own_folder(options: argparse.Namespace) -> Path:
    folder: Path = options.adapter or Path(options.model)
    if not folder.is_dir():
        raise UserError(f"{options.model} has not been trained: nothing is forgotten\nsay:  --adapter A")
    return folder


if __name__ == "__main__":
    run(main)
