"""The HTML page of `show`: records with their pictures, and what is learnt marked; one file that needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from milora_data.command import amount
from milora_data.errors import UserError
from milora_data.images import ImageError, load_image, place_of
from milora_data.page.credits import credit_lines
from milora_data.page.pictures import fitting, small
from milora_data.page.render import MAX_BYTES, render, write
from milora_data.preview import Piece
from milora_data.records import Record


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a record: its size, or what is wrong with it, in words; the small copy where it can be read."""

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
        """What the page's buttons tell apart."""
        if any(picture.jpeg is None for picture in self.pictures):
            return "with unreadable pictures"
        return "with pictures" if self.pictures else "text only"


def shown(record: Record, pieces: Sequence[Piece], counts: dict[str, int], folder: Path) -> Shown:
    """Return a record as the page has it; a picture that cannot be read is said to be so."""
    return Shown(record.id, record.source, pieces, counts, [_picture(name, folder) for name in record.images])


def write_page(path: Path, data: str, records: Sequence[Shown], folder: Path, *, is_part: bool = False) -> int:
    """Write the page and return how many records it holds: as many as 5 MB do. Pictures are below `folder`.

    `is_part`: the file holds other records too, which the page says.

    A file that exists is never replaced (`UserError`).
    """
    if path.exists():
        raise UserError(f"{path} exists already\nnothing was written; name a new file with --html")
    count, licences = len(records), credit_lines([Path(data).parent, folder, folder.parent])

    def page() -> bytes:
        return _page(data, records[:count], len(records), licences, is_part).encode("utf-8", "replace")

    while len(made := page()) > MAX_BYTES and count > 1:
        count = max(1, count * MAX_BYTES * 9 // (len(made) * 10))
    write(path, made.decode())
    return count


def _page(data: str, records: Sequence[Shown], asked: int, licences: Sequence[str], is_part: bool) -> str:
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
    whole = amount(len(records), "record") + (", not all of the file," if is_part else "")
    count = whole if len(records) == asked else f"The first {len(records):,} of {asked:,} records"
    lede = f"{count} as {'it is' if len(records) == 1 else 'they are'} learnt"
    page = {"title": data, "lede": lede, "records": content, "credits": licences}
    return render(Path(__file__).with_name("show.html.j2"), page)


def _picture(name: str, folder: Path) -> Picture:
    try:
        image = load_image(place_of(folder, name))
    except ImageError as error:
        return Picture(str(name), str(error).rpartition(": ")[2], None)
    return Picture(str(name), "{} x {}".format(*image.size), small(image))
