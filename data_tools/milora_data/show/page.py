"""The HTML page of `show`: records with their pictures and marked supervised text, in one self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from milora_data.pictures.files import ImageError, load_image, place_of
from milora_data.pictures.thumbnails import credit_lines, fitting, small
from milora_data.records.record import Record
from milora_data.show.preview import COUNTS, Piece
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import amount
from milora_vl.cli.page import MAX_BYTES, render, write


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a record: a note with its size or the reason why it is unreadable, and a small copy or None."""

    name: str
    note: str
    jpeg: bytes | None


@dataclass(frozen=True, slots=True)
class Shown:
    """One record of the page."""

    id: str
    source: str
    pieces: Sequence[Piece]
    counts: dict[str, int]
    pictures: Sequence[Picture]

    @property
    def kind(self) -> str:
        """The group of the record in the page's filter buttons."""
        if any(picture.jpeg is None for picture in self.pictures):
            return "with unreadable pictures"
        return "with pictures" if self.pictures else "text only"


def shown(record: Record, pieces: Sequence[Piece], counts: dict[str, int], folder: Path) -> Shown:
    """Return a record with its pictures for the page; unreadable pictures are marked."""
    return Shown(record.id, record.source, pieces, counts, [_picture(name, folder) for name in record.images])


def write_page(path: Path, data: str, records: Sequence[Shown], folder: Path, *, is_part: bool = False) -> int:
    """Write the page and return the number of its records, at most 5 MB of them. Pictures are below `folder`.

    `is_part`: the data contains more records; the page mentions it.
    Raises `UserError` if the file exists.
    """
    if path.exists():
        raise UserError(
            f"{path} exists already", code="output-exists", hint="nothing was written; name a new file with --html"
        )
    count, licences = len(records), credit_lines([Path(data).parent, folder, folder.parent])

    def page() -> bytes:
        return _page(data, records[:count], len(records), licences, is_part).encode("utf-8", "replace")

    while len(content := page()) > MAX_BYTES and count > 1:
        count = max(1, count * MAX_BYTES * 9 // (len(content) * 10))
    write(path, content.decode())
    return count


def _page(data: str, records: Sequence[Shown], total: int, licences: Sequence[str], is_part: bool) -> str:
    text = sum(len(piece.text) for record in records for piece in record.pieces)
    uris = iter(fitting([p.jpeg for record in records for p in record.pictures], MAX_BYTES * 9 // 10 - text))
    content = [
        {
            "id": record.id,
            "source": record.source,
            "kind": record.kind,
            "counts": record.counts,
            "pieces": record.pieces,
            "pictures": [{"name": p.name, "note": p.note, "uri": next(uris)} for p in record.pictures],
        }
        for record in records
    ]
    all_records = amount(len(records), "record") + (", not all of the file," if is_part else "")
    count = all_records if len(records) == total else f"The first {len(records):,} of {total:,} records"
    lede = f"{count} as training sees {'it' if len(records) == 1 else 'them'}"
    page = {"title": data, "lede": lede, "records": content, "credits": licences, "count_names": COUNTS}
    return render(Path(__file__).with_name("show.html.j2"), page)


def _picture(name: str, folder: Path) -> Picture:
    try:
        image = load_image(place_of(folder, name))
    except ImageError as error:
        return Picture(str(name), error.reason, None)
    return Picture(str(name), "{} x {}".format(*image.size), small(image))
