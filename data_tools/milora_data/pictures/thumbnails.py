"""Pictures that are small enough to be embedded in a page, and the lines that credit their authors."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.pictures.files import ImageError, load_image

if TYPE_CHECKING:
    from PIL import Image

SIDE = 320  # pixels; shown at half this size on high-density screens
_LEAST = 64


def data_uri(content: bytes, mime: str) -> str:
    """Return the bytes as a URI that can be embedded in a page.

    >>> data_uri(b"abc", "image/png")
    'data:image/png;base64,YWJj'
    """
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def thumbnail(place: str | Path | None, side: int = SIDE) -> bytes | None:
    """Return a picture, loaded like a model's input, as a small JPEG; None if it is missing or cannot be read."""
    try:
        return None if place is None else small(load_image(place), side)
    except ImageError:
        return None


def small(image: Image.Image, side: int = SIDE) -> bytes:
    """Return an RGB picture as a JPEG of at most `side` pixels per side."""
    copy = image.copy()
    copy.thumbnail((side, side))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def fitting(pictures: Sequence[bytes | None], budget: int) -> list[str]:
    """Return JPEGs as URIs ("" for none), all resized to the same side so that they take at most `budget` characters.

    The side is at least 64 pixels, so many pictures may take more.
    """
    from PIL import Image

    resized, side = list(pictures), SIDE
    while sum(len(one) for one in resized if one) * 4 // 3 > budget and side > _LEAST:
        side = max(_LEAST, side * 3 // 4)
        resized = [small(Image.open(io.BytesIO(one)), side) if one else None for one in pictures]
    return [data_uri(one, "image/jpeg") if one else "" for one in resized]


def credit_lines(folders: Iterable[Path]) -> list[str]:
    """Return the lines that mention a licence in the README.md of each folder, without repeats."""
    readmes = dict.fromkeys((folder / "README.md").resolve() for folder in folders)
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in readmes if file.is_file())
    lines = (line.strip(" *-").replace("`", "") for text in texts for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if re.search(r"\blicen[cs]e\b", line, re.IGNORECASE)))
