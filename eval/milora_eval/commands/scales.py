"""`python -m milora_eval scales`: evaluate several sizes of an update: score over forgetting."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from milora_eval.answers.target import eval_target
from milora_eval.commands.run import ASKING, INPUTS, OUTPUTS, planned
from milora_vl.common.cli.command_line import next_step
from milora_vl.common.cli.flags import Command, option, positive, shared
from milora_vl.common.cli.table import show
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import model_of


def scales(text: str) -> tuple[float, ...]:
    """Parse the value of --scales: numbers from 0, without duplicates, in rising order."""
    try:
        found = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        found = []
    if not found or not all(0 <= scale < float("inf") for scale in found):
        raise argparse.ArgumentTypeError(f"expected numbers from 0, such as 0,0.5,1, got {text!r}")
    return tuple(found)


DEFAULT = "0,0.25,0.5,0.75,1"
COMMAND = Command(
    "milora_eval scales",
    "Evaluate a trained model at several sizes of its update, and plot the score over what is forgotten.",
    f"""\
Scale 1 is the trained model, 0 its base. Answers are stored as `run` stores them, so the command resumes where it was
stopped, and another list of scales asks only new questions. Default scales: {DEFAULT}

examples:
  python -m milora_eval scales --model smol-llava --adapter runs/demo --suite emoji --data data/emoji --limit 200 \\
      --output_dir runs/demo
  python -m milora_vl.export runs/demo --scale 0.7 --to adapter       # keep the size that you prefer
""",
    inputs=INPUTS,
    settings=(
        option(
            "--scales", type=scales, default=DEFAULT, metavar="X,Y", help="sizes of the update (default: %(default)s)"
        ),
        *ASKING,
        option(
            "--forgetting_tokens",
            type=positive,
            default=8192,
            help="tokens of general text to measure forgetting on (default: %(default)s)",
        ),
        shared("device"),
        shared("dtype"),
    ),
    outputs=OUTPUTS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. All flags and data files are checked before the model is loaded."""
    options = COMMAND.parse(argv)
    options.model = model_of(options.model, options.adapter, "milora_eval", "scales", "--adapter")
    target = eval_target(options.model, options.adapter, options.base, dtype=options.dtype, device=options.device)
    if not target.has_base:
        raise UserError(
            "there is no update to scale: an adapter, or a fully trained model and its base",
            code="flag-needs-another",
            where="--model",
            hint="add:  --adapter FOLDER   or   --base MODEL",
        )
    plan, items = planned(options, target)
    sys.stderr.write(f"loading {options.model}" + (f" with {target.adapter}\n" if target.adapter else "\n"))
    from milora_eval import scan

    points = scan.scan(options.scales, target, plan, items, options.output_dir, options.forgetting_tokens)
    folder = scan.write(points, options.output_dir, plan.suite, target.which)
    if options.format == "json":
        sys.stdout.write(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    else:
        show(scan.table(points, plan.suite), options.format)
    sys.stderr.write(f"written: {folder / scan.PLOT}, {folder / scan.FILE}\n")
    if target.adapter is not None:
        next_step("milora_vl.export", target.adapter, "--scale", "X", "--to", "adapter")
    return 0
