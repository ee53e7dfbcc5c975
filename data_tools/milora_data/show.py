"""`python -m milora_data show`: print records as training sees them, with the loss mask."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from milora_data.cards import Card, small, write_cards
from milora_data.check import image_folder
from milora_data.encode.templates import OWN, Segment, get_template, images_first, render
from milora_data.keys import FileKeys, record_key
from milora_data.pictures.load import ImageError, load_image
from milora_data.records.boxes import boxes_in, with_pixels
from milora_data.records.record import IMAGE, Record, Turn
from milora_data.stream import load_records
from milora_vl.common.atomic_write import json_lines
from milora_vl.common.cli.console import amount, command_line, next_step
from milora_vl.common.cli.parser import DATA, Command, count, option, positive, shared
from milora_vl.common.errors import DataError, UserError, with_context
from milora_vl.common.yaml_text import read_file
from milora_vl.core.adapter.folders import holds_adapter

STYLES = {"learnt": "bold green", "given": "", "picture": "magenta"}  # keys of the JSON output
LOSSES = ("loss", "base_loss", "reply")  # keys of a line of held_out.jsonl
DEFAULT_TEMPLATE = "vicuna_v1"
COMMAND = Command(
    "milora_data show",
    "Print records as training sees them, with the loss mask.",
    """\
[[ ]] marks the supervised text; a training with --dry-run counts the tokens of its model, which writes tools in
its own form

examples:
  python -m milora_data show train.json
  python -m milora_data show train.json --limit 50 --html records.html
  python -m milora_data show train.json --id 000000033471 --template llama_3
  python -m milora_data show val.json --worst runs/a --limit 20 --html worst.html    # or --worst losses.jsonl
""",
    inputs=(
        DATA,
        shared("image_folder", about="folder of the pictures (default: beside DATA)"),
        option("--id", help="print only the record with this id"),
        option("--index", type=count, default=0, help="first record to print, from 0 (default: %(default)s)"),
        option(
            "--worst",
            type=Path,
            metavar="LOSSES",
            help="highest loss first: a run with held-out records, or a file of  python -m milora_eval losses",
        ),
        option("--limit", type=positive, help="number of records (default: 1; 100 with --html)"),
    ),
    settings=(shared("template", about="prompt format (default: the format of the run of --worst, else vicuna_v1)"),),
    outputs=(
        option("--html", type=Path, metavar="OUT", help="write a page with the pictures to this new file"),
        shared("format"),
    ),
)


class Piece(NamedTuple):
    """A piece of text. The kinds are keys of the JSON output: supervised text, other text, and `<image>`."""

    kind: Literal["learnt", "given", "picture"]
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    chosen = COMMAND.parse(argv)
    folder = image_folder(chosen.data, chosen.image_folder)
    limit = (1 if chosen.html is None else 100) if chosen.limit is None else chosen.limit
    found = load_records(chosen.data) if chosen.worst is None else iter(_worst(chosen.data, folder, chosen.worst))
    records, template = _select(found, chosen, limit + 1), _template(chosen)
    shown = [(record, pieces_of(record, template)) for record in records[:limit]]
    if chosen.html is not None:
        is_part = len(records) > limit or chosen.index > 0 or chosen.id is not None
        _write_page(chosen, [_card(record, pieces, folder) for record, pieces in shown], folder, is_part=is_part)
    for number, (record, pieces) in enumerate(shown if chosen.html is None else ()):
        if chosen.format == "json":
            sys.stdout.write(json.dumps(_content(record, pieces), ensure_ascii=False, default=str) + "\n")
        else:
            _print(record, pieces, folder, separate=number > 0)
    pictures = ["--image_folder", folder] if chosen.image_folder else []
    next_step("milora_data", "check", chosen.data, *pictures)
    return 0


def _select(records: Iterator[Record], chosen: argparse.Namespace, limit: int) -> list[Record]:
    if chosen.id is not None:
        records = (record for record in records if record.id == chosen.id)
    selected = list(islice(records, chosen.index, chosen.index + limit))
    if not selected:
        selector = f'id "{chosen.id}"' if chosen.id is not None else f"number {chosen.index}"
        raise UserError(f"{chosen.data} contains no record with {selector}")
    return selected


def _worst(data: Path, folder: Path, losses: Path) -> list[Record]:
    """Return the records of `data` with a loss in a file or run, highest first; it becomes a key of theirs."""
    file, key_of = losses / "held_out.jsonl" if losses.is_dir() else losses, FileKeys(folder)
    if not file.is_file():
        flag = "--model" if losses.is_dir() and not holds_adapter(losses) else "--adapter"
        of = ["--image_folder", folder, flag, losses if losses.is_dir() else "RUN"]
        call = command_line("milora_eval", "losses", data, *of, "--output", "LOSSES.jsonl")
        raise UserError("no losses of records", where=str(file), hint=f"write them:  {call}")
    records, lines = {record_key(record, key_of): record for record in load_records(data)}, list(json_lines(file))
    found = [
        replace(records[line["key"]], extra={**records[line["key"]].extra, **{k: line[k] for k in LOSSES if k in line}})
        for line in lines
        if line["key"] in records
    ]
    if not found:
        hint = "name the data of the losses, and the folder of its pictures"
        raise UserError(f"{data} has no record with a loss", where=str(file), hint=hint)
    if len(found) < len(lines):
        sys.stderr.write(f"note: {data} lacks {amount(len(lines) - len(found), 'record')} with a loss\n")
    if unknown := len(records.keys() - {line["key"] for line in lines}):
        sys.stderr.write(f"note: {amount(unknown, 'record')} of {data} without a loss, not shown\n")
    return found


def _template(chosen: argparse.Namespace) -> str:
    """Return the template that the records are shown in: the option, or the run's, if these pages have it."""
    if chosen.template is not None or chosen.worst is None:
        return chosen.template or DEFAULT_TEMPLATE
    recipe = (chosen.worst if chosen.worst.is_dir() else chosen.worst.parent) / "recipe.yaml"
    template = str(read_file(recipe)["template"]) if recipe.is_file() else DEFAULT_TEMPLATE
    if template != OWN:
        return template
    sys.stderr.write(f"note: the run has the model's own prompt format; the records are shown in {DEFAULT_TEMPLATE}\n")
    return DEFAULT_TEMPLATE


def pieces_of(record: Record, template: str = DEFAULT_TEMPLATE) -> list[Piece]:
    """Return the pieces of a record in a prompt format. Raises `DataError` with file and line, like `encode`."""
    try:
        turns = [replace(turn, text=with_pixels(turn.text)) for turn in record.turns]
        turns = images_first(turns, len(record.images))
        has_tools = any(turn.role == "tools" or turn.keys for turn in turns)
        segments = _with_tools(turns) if has_tools else render(turns, get_template(template), "</s>")
    except DataError as error:
        raise with_context(error, record.place) from None
    pieces = []
    for supervised, group in groupby(segments, attrgetter("supervised")):
        for number, part in enumerate("".join(segment.text for segment in group).split(IMAGE)):
            pieces += [Piece("picture", IMAGE)] * bool(number)
            pieces += [Piece("learnt" if supervised else "given", part)] * bool(part)
    return pieces


def _with_tools(turns: Sequence[Turn]) -> list[Segment]:
    """Return turns with tools in a plain form: the model's own template, which writes them, is not loaded here."""
    return [
        Segment(text, supervised)
        for turn in turns
        for text, supervised in (
            (f"{turn.role}: ", False),
            ("\n".join(filter(None, [turn.text, turn.keys])), turn.role == "assistant" and turn.weight == 1),
            ("\n", False),
        )
    ]


def _content(record: Record, pieces: Sequence[Piece]) -> dict[str, Any]:
    return {
        "id": record.id,
        "source": record.source,
        "images": list(map(str, record.images)),
        **({"videos": [video.as_json() for video in record.videos]} if record.videos else {}),
        "pieces": [piece._asdict() for piece in pieces],
        **({"extra": dict(record.extra)} if record.extra else {}),
    }


def _print(record: Record, pieces: Sequence[Piece], folder: Path, *, separate: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if separate:
        console.print()
    console.print(f"{record.id or '(no id)'}   {record.source}", style="bold")
    for caption, _ in _pictures(record, folder):
        console.print(f"picture: {caption}", style="dim")
    for video in record.videos:
        console.print(f"video: {video.file or amount(len(video.frames), 'frame')}", style="dim")
    if record.extra:
        console.print(f"more keys: {json.dumps(dict(record.extra), ensure_ascii=False, default=str)}", style="dim")
    # Brackets mark the supervised text without colours too.
    marked = [(f"[[{text}]]" if kind == "learnt" else text, STYLES[kind]) for kind, text in pieces]
    console.print(Text.assemble(*marked))


def _pictures(record: Record, folder: Path) -> list[tuple[str, bytes | None]]:
    """Return each picture's name and size and a small JPEG; if it is unreadable, the reason and None."""
    pictures: list[tuple[str, bytes | None]] = []
    boxes = list(boxes_in(turn.text for turn in record.turns))
    for number, picture in enumerate(record.images):
        try:
            image = load_image(picture.within(folder))
            _draw(image, [box for of_picture, box in boxes if of_picture == number])
        except ImageError as error:
            pictures.append((f"{picture} ({error.reason})", None))
        else:
            pictures.append((f"{picture} ({image.width} x {image.height})", small(image)))
    return pictures


def _draw(image: Any, boxes: Sequence[Sequence[float]]) -> None:
    """Draw boxes, and points as small boxes, on a picture."""
    from PIL import ImageDraw

    width = max(2, max(image.size) // 200)
    for box in boxes:
        corners = box if len(box) == 4 else [box[0] - width, box[1] - width, box[0] + width, box[1] + width]
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            ImageDraw.Draw(image).rectangle(tuple(corners), outline="red", width=width)


def _card(record: Record, pieces: Sequence[Piece], folder: Path) -> Card:
    pictures = _pictures(record, folder)
    kind = "with pictures" if pictures else "text only"
    if any(jpeg is None for _, jpeg in pictures):
        kind = "with unreadable pictures"
    return Card(f"{record.id or '(no id)'} · {record.source}", pieces, pictures, kinds=[kind])


def _write_page(chosen: argparse.Namespace, cards: Sequence[Card], folder: Path, *, is_part: bool) -> None:
    """Write the page. Raises `UserError` if the file exists."""
    if chosen.html.exists():
        hint = "nothing was written; name a new file with --html"
        raise UserError(f"{chosen.html} exists already", code="output-exists", hint=hint)
    count = amount(len(cards), "record") + (", not all of the file," if is_part else "")
    write_cards(
        chosen.html,
        cards,
        kind="records",
        title=str(chosen.data),
        lede=f"{count} as training sees {'it' if len(cards) == 1 else 'them'}",
        note="The supervised text is green and underlined; the model only reads everything else.",
        credited=[chosen.data.parent, folder, folder.parent],
    )
    as_json = json.dumps({"page": str(chosen.html), "records": len(cards)})
    sys.stdout.write(as_json + "\n" if chosen.format == "json" else f"{chosen.html}: {amount(len(cards), 'record')}\n")
