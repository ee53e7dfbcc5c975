"""`python -m milora_data show`: records as training sees them, with the mask."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from milora_data.check import image_folder
from milora_data.command import amount, count, next_step, parser, positive
from milora_data.encode import encode
from milora_data.errors import UserError
from milora_data.flags import RECORDS, shared
from milora_data.images import ImageError, load_image, place_of
from milora_data.preview import Piece, as_rich, text_pieces, token_pieces
from milora_data.records import Record, load_records
from milora_data.show_page import Shown, shown, write_page
from milora_data.tokens import load_tokenizer

EPILOG = """\
what is learnt stands in [[ ]]; with --tokenizer the text is decoded from the very ids

examples:
  python -m milora_data show train.json
  python -m milora_data show train.json --limit 50 --html records.html
  python -m milora_data show train.json --id 000000033471 --tokenizer runs/demo --image_tokens 16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser("python -m milora_data show", "Print records as they are learnt, with the mask.", EPILOG)
    given = options.add_argument_group("input")
    given.add_argument("data", type=Path, metavar="DATA", help=RECORDS)
    shared(given, "image_folder", about="folder of the pictures (default: beside DATA)")
    given.add_argument("--id", help="only the record with this id")
    given.add_argument("--index", type=count, default=0, help="first record to print, from 0 (default: %(default)s)")
    given.add_argument("--limit", type=positive, help="number of records (default: 1; 100 with --html)")
    settings = options.add_argument_group("settings")
    shared(settings, "template", default="vicuna_v1", about="prompt format (default: %(default)s)")
    settings.add_argument("--tokenizer", help="folder or name of a tokenizer, to see tokens")
    settings.add_argument("--image_tokens", type=count, default=576, help="tokens of a picture (default: %(default)s)")
    settings.add_argument("--max_length", type=count, help="cut as training would")
    out = options.add_argument_group("output")
    out.add_argument("--html", type=Path, metavar="OUT", help="write a page with the pictures to this new file")
    shared(out, "format")
    chosen = options.parse_args(argv)
    folder = image_folder(chosen.data, chosen.image_folder)
    tokenizer = None if chosen.tokenizer is None else load_tokenizer(chosen.tokenizer)
    limit = (1 if chosen.html is None else 100) if chosen.limit is None else chosen.limit
    found = _chosen(chosen.data, chosen.id, chosen.index, limit + 1)
    page = []
    for number, record in enumerate(found[:limit]):
        pieces, counts = _pieces(record, tokenizer, chosen.template, chosen.image_tokens, chosen.max_length)
        if chosen.html is not None:
            page.append(shown(record, pieces, counts, folder))
        elif chosen.format == "json":
            sys.stdout.write(json.dumps(_content(record, pieces, counts), ensure_ascii=False) + "\n")
        else:
            _print(record, pieces, counts, folder, separate=number > 0)
    if chosen.html is not None:
        _write_page(chosen, page, folder, is_part=len(found) > limit or chosen.index > 0 or chosen.id is not None)
    pictures = ["--image_folder", folder] if chosen.image_folder else []
    next_step("milora_data", "check", chosen.data, *pictures)
    return 0


def _write_page(chosen: argparse.Namespace, records: Sequence[Shown], folder: Path, *, is_part: bool) -> None:
    written = write_page(chosen.html, str(chosen.data), records, folder, is_part=is_part)
    as_json = json.dumps({"page": str(chosen.html), "records": written})
    sys.stdout.write(as_json + "\n" if chosen.format == "json" else f"{chosen.html}: {amount(written, 'record')}\n")
    if written < len(records):
        sys.stderr.write(f"the page holds the first {written:,} of {len(records):,}: no page is larger than 5 MB\n")


def _chosen(data: Path, name: str | None, index: int, limit: int) -> list[Record]:
    records = load_records(data)
    if name is not None:
        records = (record for record in records if record.id == name)
    found = list(islice(records, index, index + limit))
    if not found:
        asked = f'id "{name}"' if name is not None else f"number {index}"
        raise UserError(f"{data} holds no record with {asked}\nsee: python -m milora_data stats {data}")
    return found


def _pieces(
    record: Record, tokenizer: Any, template: str, image_tokens: int, max_length: int | None
) -> tuple[list[Piece], dict[str, int]]:
    if tokenizer is None:
        return text_pieces(record, template=template), {}
    made = encode(
        record,
        tokenizer,
        template=template,
        image_token_id=-200,
        image_tokens=image_tokens,
        max_length=max_length,
    )
    learnt = sum(label >= 0 for label in made.labels)
    counts = {
        "tokens": len(made.input_ids),
        "learnt": learnt,
        "of_pictures": made.num_images * image_tokens,
        "cut": made.num_cut,
    }
    return token_pieces(made, tokenizer, -200), counts


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
        console.print(", ".join(f"{number:,} {what.replace('_', ' ')}" for what, number in counts.items()), style="dim")
    console.print(as_rich(pieces))


def _size(path: str | Path) -> str:
    try:
        return "{} x {}".format(*load_image(path).size)
    except ImageError as error:
        return str(error).rpartition(": ")[2]
