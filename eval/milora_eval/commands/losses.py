"""`python -m milora_eval losses`: the loss of each record of a file, highest first, to find wrong labels."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_data.check import image_folder
from milora_data.keys import FileKeys, record_key
from milora_data.stream import record_items
from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.console import amount, next_step
from milora_vl.common.cli.parser import DATA, OR_ADAPTER, Command, option, shared
from milora_vl.common.errors import DataError, UserError, no_records
from milora_vl.core.adapter.folders import model_of

log = logging.getLogger(__name__)

COMMAND = Command(
    "milora_eval losses",
    "Compute the loss of each record of a file, in nats per token: wrong labels come first.",
    """\
examples:
  python -m milora_eval losses train.json --adapter runs/a --output losses.jsonl
  python -m milora_data show train.json --worst losses.jsonl --limit 50 --html worst.html
""",
    inputs=(
        DATA,
        shared("model", about=OR_ADAPTER),
        shared("adapter"),
        shared("image_folder", about="folder of the pictures (default: beside DATA)"),
    ),
    settings=(
        shared("template"),
        shared("batch_size", default=8, about="records per batch (default: %(default)s)"),
        shared("device"),
        shared("dtype"),
    ),
    outputs=(
        option("--output", type=Path, metavar="FILE", required=True, help="new file, JSON lines"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    model = model_of(options.model, options.adapter, "milora_eval", "losses", options.data, "--adapter")
    if options.output.exists():
        hint = "nothing was written; name a new file with --output"
        raise UserError(f"{options.output} exists already", code="output-exists", hint=hint)
    lines, left_out = _losses(model, options)
    if not lines:
        raise UserError(
            f"{options.data} has no record with a loss", code="no-losses", hint="see what was left out, above"
        )
    write_text(options.output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    as_json = json.dumps({"file": str(options.output), "records": len(lines), "left_out": left_out})
    text = f"{options.output}: {amount(len(lines), 'record')}" + (f", {left_out:,} left out" if left_out else "")
    sys.stdout.write((as_json if options.format == "json" else text) + "\n")
    pictures = ["--image_folder", options.image_folder] if options.image_folder else []
    next_step("milora_data", "show", options.data, *pictures, "--worst", options.output, "--limit", 20)
    return 0


def _losses(model: str, options: argparse.Namespace) -> tuple[list[dict[str, object]], int]:
    """Return a line for each record that can be used, highest loss first, and the number of the others; logs each."""
    from milora_data.batches.record_collator import record_of
    from milora_vl.core.adapter.folders import recipe_of_run
    from milora_vl.interop.load_model import load_by_flags
    from milora_vl.models.collator_for import collator_for
    from milora_vl.models.losses import record_losses
    from milora_vl.models.prompts import prompts_of

    folder, items = image_folder(options.data, options.image_folder), list(record_items(options.data))
    errors = [item for item in items if isinstance(item, DataError)]
    if len(errors) == len(items):
        raise errors[0] if errors else DataError(problems=[no_records(options.data)])
    prompts = prompts_of(model, options.adapter, options.template)
    loaded, processor = load_by_flags(model, options.adapter, options.dtype, options.device)
    prompts.limit(processor)
    collate = collator_for(
        loaded,
        processor,
        template=prompts.template,
        image_folder=folder,
        image_aspect_ratio=prompts.image_aspect_ratio,
        max_length=(recipe_of_run(options.adapter or Path(model)).get("data") or {}).get("max_length"),
        bad_images="skip",
        substitutes=items,
    )
    records = []
    for item in items:
        try:
            collate.require_usable(record := record_of(item))
            records.append(record)
        except DataError as error:
            log.warning("left out: %s", error)
    losses, key_of = record_losses(loaded, collate, records, options.batch_size), FileKeys(folder)
    lines: list[dict[str, object]] = [
        {"key": record_key(record, key_of), "source": record.place, "loss": loss}
        for record, loss in sorted(losses, key=lambda pair: -pair[1])
    ]
    return lines, len(items) - len(lines)
