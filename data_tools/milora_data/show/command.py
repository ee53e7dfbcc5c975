"""`python -m milora_data show`: print records as training sees them, with the loss mask."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from milora_data.check.command import image_folder
from milora_data.encode.labels import IGNORE, Encoded, encode
from milora_data.encode.templates import get_template, place_images, render
from milora_data.encode.tokens import load_tokenizer
from milora_data.pictures.files import ImageError, load_image, place_of
from milora_data.pictures.thumbnails import credit_lines, fitting, small
from milora_data.records.record import IMAGE, Record
from milora_data.stream.sources import load_records
from milora_vl.common.cli import page as html
from milora_vl.common.cli.command_line import amount, next_step
from milora_vl.common.cli.flags import DATA, Command, count, option, positive, shared
from milora_vl.common.errors import DataError, UserError, with_context

if TYPE_CHECKING:
    from rich.text import Text

STYLES = {"learnt": "bold green", "given": "", "picture": "magenta"}  # keys of the JSON output
COUNTS = {"tokens": "tokens", "learnt": "supervised", "of_pictures": "of pictures", "cut": "cut"}
"""Keys of the counts in the JSON output, and their names in texts."""
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
            page.append(_card(record, pieces, counts, folder))
        elif chosen.format == "json":
            sys.stdout.write(json.dumps(_content(record, pieces, counts), ensure_ascii=False) + "\n")
        else:
            _print(record, pieces, counts, folder, separate=number > 0)
    if chosen.html is not None:
        _write_page(chosen, page, folder, is_part=len(records) > limit or chosen.index > 0 or chosen.id is not None)
    pictures = ["--image_folder", folder] if chosen.image_folder else []
    next_step("milora_data", "check", chosen.data, *pictures)
    return 0


def _card(record: Record, pieces: Sequence[Piece], counts: dict[str, int], folder: Path) -> dict[str, Any]:
    """Return what the page shows of a record; an unreadable picture has the reason as its note, and no JPEG."""
    pictures: list[dict[str, Any]] = []
    for name in record.images:
        try:
            image = load_image(place_of(folder, name))
        except ImageError as error:
            pictures.append({"name": str(name), "note": error.reason, "jpeg": None})
        else:
            pictures.append({"name": str(name), "note": "{} x {}".format(*image.size), "jpeg": small(image)})
    kind = "with pictures" if pictures else "text only"
    if any(picture["jpeg"] is None for picture in pictures):
        kind = "with unreadable pictures"
    return {
        "id": record.id,
        "source": record.source,
        "kind": kind,
        "counts": counts,
        "pieces": pieces,
        "pictures": pictures,
    }


def _write_page(chosen: argparse.Namespace, cards: Sequence[dict[str, Any]], folder: Path, *, is_part: bool) -> None:
    """Write the page; its pictures take at most 5 MB. Raises `UserError` if the file exists."""
    if chosen.html.exists():
        raise UserError(
            f"{chosen.html} exists already",
            code="output-exists",
            hint="nothing was written; name a new file with --html",
        )
    pictures = [picture for card in cards for picture in card["pictures"]]
    for picture, uri in zip(pictures, fitting([picture["jpeg"] for picture in pictures], html.MAX_BYTES), strict=True):
        picture["uri"] = uri
    count = amount(len(cards), "record") + (", not all of the file," if is_part else "")
    content = {
        "title": str(chosen.data),
        "lede": f"{count} as training sees {'it' if len(cards) == 1 else 'them'}",
        "records": cards,
        "credits": credit_lines([chosen.data.parent, folder, folder.parent]),
        "count_names": COUNTS,
    }
    html.write(chosen.html, html.render(Path(__file__).with_name("show.html.j2"), content))
    as_json = json.dumps({"page": str(chosen.html), "records": len(cards)})
    sys.stdout.write(as_json + "\n" if chosen.format == "json" else f"{chosen.html}: {amount(len(cards), 'record')}\n")


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
        **({"videos": [video._asdict() for video in record.videos]} if record.videos else {}),
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
    for video in record.videos:
        console.print(f"video: {video.file or amount(len(video.frames), 'frame')}", style="dim")
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


class Piece(NamedTuple):
    """A piece of text. The kinds are keys of the JSON output: supervised text, other text, and picture tokens."""

    kind: Literal["learnt", "given", "picture"]
    text: str


def text_pieces(record: Record, *, template: str = "vicuna_v1", eos: str = "</s>") -> list[Piece]:
    """Return the pieces of a record without a tokenizer. Raises `DataError` with file and line, like `encode`."""
    try:
        segments = render(place_images(record.turns, len(record.images)), get_template(template), eos, bos="<s>")
    except DataError as error:
        raise with_context(error, record.source or f"record {record.id!r}") from None
    pieces = []
    for text, supervised in segments:
        for number, part in enumerate(text.split(IMAGE)):
            pieces += [Piece("picture", IMAGE)] * bool(number)
            pieces += [Piece("learnt" if supervised else "given", part)] * bool(part)
    return _merged(pieces)


def token_pieces(encoded: Encoded, tokenizer: Any, image_token_id: int) -> list[Piece]:
    """Return the pieces of an encoded record, decoded from its token ids."""

    def kind(pair: tuple[int, int]) -> Literal["learnt", "given", "picture"]:
        token, label = pair
        return "picture" if token == image_token_id else "given" if label == IGNORE else "learnt"

    pieces, text_ids, before = [], [], ""
    for name, group in groupby(zip(encoded.input_ids, encoded.labels, strict=True), key=kind):
        ids = [token for token, _ in group]
        if name == "picture":
            pieces.append(Piece(name, f"<image x {len(ids)}>"))
            continue
        # Decoding a piece alone would drop its leading blank.
        text_ids += ids
        text = tokenizer.decode(text_ids)
        pieces.append(Piece(name, text[len(before) :]))
        before = text
    return pieces


def as_rich(pieces: Sequence[Piece]) -> Text:
    """Return the pieces for a terminal; supervised text is in [[ ]], so that it is visible without colours too."""
    from rich.text import Text

    shown = [(f"[[{text}]]" if kind == "learnt" else text, STYLES[kind]) for kind, text in pieces]
    return Text.assemble(*shown)


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1].kind == piece.kind != "picture":
            merged[-1] = Piece(piece.kind, merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return merged
