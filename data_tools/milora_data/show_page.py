"""The HTML page of `show`: records with their pictures, and what is learnt marked; one file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .images import ImageError, load_image, place_of
from .preview import Piece
from .records import Record

THUMBNAIL = 320


@dataclass(frozen=True, slots=True)
class Shown:
    """One record of the page."""

    id: str
    source: str
    pieces: Sequence[Piece]
    counts: dict[str, int]
    pictures: list[dict[str, str]]


def shown(record: Record, pieces: Sequence[Piece], counts: dict[str, int], folder: Path) -> Shown:
    """Return a record as the page has it, its pictures as thumbnails; one that cannot be read is said to be so."""
    pictures = [{"name": str(name), **_thumbnail(place_of(folder, name))} for name in record.images]
    return Shown(record.id, record.source, pieces, counts, pictures)


def write_page(path: Path, title: str, records: Sequence[Shown]) -> None:
    """Write the page; a file that exists is never replaced (`UserError`)."""
    from jinja2 import Environment

    if path.exists():
        raise UserError(f"{path} exists already\nnothing was written; name a new file with --html")
    template = Path(__file__).with_name("show.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=False).from_string(template).render(title=title, records=records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")


def _thumbnail(place: str | Path) -> dict[str, str]:
    try:
        image = load_image(place)
    except ImageError as error:
        return {"uri": "", "note": str(error).rpartition(": ")[2]}
    note = "{} x {}".format(*image.size)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return {"uri": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", "note": note}
