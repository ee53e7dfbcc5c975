"""`python -m milora_data show`: print records as training sees them, with the loss mask."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from milora_data.check.command import image_folder
from milora_data.encode.labels import encode
from milora_data.encode.tokens import load_tokenizer
from milora_data.pictures.files import ImageError, load_image, place_of
from milora_data.records.record import Record
from milora_data.show.page import Shown, shown, write_page
from milora_data.show.preview import COUNTS, Piece, as_rich, text_pieces, token_pieces
from milora_data.stream.sources import load_records
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import amount, count, next_step, positive
from milora_vl.cli.flags import DATA, Command, option, shared

COMMAND = Command(
    "milora_data show",
    "Print records as training sees them, with the loss mask.",
    """\
[[ ]] marks the supervised text; with --tokenizer, the text is decoded from the token ids

examples:
  python -m milora_data show train.json
  python -m milora_data show train.json --limit 50 --html records.html
  python -m milora_data show train.json --id 000000033471 --tokenizer runs/demo --image_tokens 16
""",
    inputs=(
        DATA,
        shared("image_folder", about="folder of the pictures (default: beside DATA)"),
        option("--id", help="print only the record with this id"),
        option("--index", type=count, default=0, help="first record to print, from 0 (default: %(default)s)"),
        option("--limit", type=positive, help="number of records (default: 1; 100 with --html)"),
    ),
    settings=(
        shared("template", default="vicuna_v1", about="prompt format (default: %(default)s)"),
        option("--tokenizer", help="folder or name of a tokenizer; shows tokens"),
        shared("image_tokens"),
        option("--max_length", type=count, help="cut records to this number of tokens, as training does"),
    ),
    outputs=(
        option("--html", type=Path, metavar="OUT", help="write a page with the pictures to this new file"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    chosen = COMMAND.parse(argv)
    folder = image_folder(chosen.data, chosen.image_folder)
    tokenizer = None if chosen.tokenizer is None else load_tokenizer(chosen.tokenizer)
    limit = (1 if chosen.html is None else 100) if chosen.limit is None else chosen.limit
    records = _select(chosen.data, chosen.id, chosen.index, limit + 1)
    page = []
    for number, record in enumerate(records[:limit]):
        pieces, counts = _pieces(record, tokenizer, chosen.template, chosen.image_tokens, chosen.max_length)
        if chosen.html is not None:
            page.append(shown(record, pieces, counts, folder))
        elif chosen.format == "json":
            sys.stdout.write(json.dumps(_content(record, pieces, counts), ensure_ascii=False) + "\n")
        else:
            _print(record, pieces, counts, folder, separate=number > 0)
    if chosen.html is not None:
        _write_page(chosen, page, folder, is_part=len(records) > limit or chosen.index > 0 or chosen.id is not None)
    pictures = ["--image_folder", folder] if chosen.image_folder else []
    next_step("milora_data", "check", chosen.data, *pictures)
    return 0


def _write_page(chosen: argparse.Namespace, records: Sequence[Shown], folder: Path, *, is_part: bool) -> None:
    written = write_page(chosen.html, str(chosen.data), records, folder, is_part=is_part)
    as_json = json.dumps({"page": str(chosen.html), "records": written})
    sys.stdout.write(as_json + "\n" if chosen.format == "json" else f"{chosen.html}: {amount(written, 'record')}\n")
    if written < len(records):
        sys.stderr.write(
            f"the page contains the first {written:,} of {len(records):,} records: pages are at most 5 MB\n"
        )


def _select(data: Path, name: str | None, index: int, limit: int) -> list[Record]:
    records = load_records(data)
    if name is not None:
        records = (record for record in records if record.id == name)
    selected = list(islice(records, index, index + limit))
    if not selected:
        selector = f'id "{name}"' if name is not None else f"number {index}"
        raise UserError(
            f"{data} contains no record with {selector}",
            code="record-not-found",
            hint=f"see: python -m milora_data stats {data}",
        )
    return selected


def _pieces(
    record: Record, tokenizer: Any, template: str, image_tokens: int, max_length: int | None
) -> tuple[list[Piece], dict[str, int]]:
    if tokenizer is None:
        return text_pieces(record, template=template), {}
    encoded = encode(
        record,
        tokenizer,
        template=template,
        image_token_id=-200,
        image_tokens=image_tokens,
        max_length=max_length,
    )
    supervised = sum(label >= 0 for label in encoded.labels)
    counts = {
        "tokens": len(encoded.input_ids),
        "learnt": supervised,
        "of_pictures": encoded.num_images * image_tokens,
        "cut": encoded.num_cut,
    }
    return token_pieces(encoded, tokenizer, -200), counts


def _content(record: Record, pieces: Sequence[Piece], counts: dict[str, int]) -> dict[str, Any]:
    return {
        "id": record.id,
        "source": record.source,
        "images": record.images,
        "pieces": [piece._asdict() for piece in pieces],
        **({"tokens": counts} if counts else {}),
        **({"extra": dict(record.extra)} if record.extra else {}),
    }


def _print(record: Record, pieces: Sequence[Piece], counts: dict[str, int], folder: Path, *, separate: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if separate:
        console.print()
    console.print(f"{record.id or '(no id)'}   {record.source}", style="bold")
    for name in record.images:
        console.print(f"picture: {name} ({_size(place_of(folder, name))})", style="dim")
    if record.extra:
        console.print(f"more keys: {json.dumps(dict(record.extra), ensure_ascii=False)}", style="dim")
    if counts:
        console.print(", ".join(f"{number:,} {COUNTS[name]}" for name, number in counts.items()), style="dim")
    console.print(as_rich(pieces))


def _size(path: str | Path) -> str:
    try:
        return "{} x {}".format(*load_image(path).size)
    except ImageError as error:
        return error.reason
