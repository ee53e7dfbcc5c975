"""Pictures small enough to lie inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.images import ImageError, load_image

if TYPE_CHECKING:
    from PIL import Image

SIDE = 320  # pixels: shown at half of it on dense screens
_LEAST = 64


def data_uri(content: bytes, mime: str) -> str:
    """Return the bytes as a URI that a page can hold.

    >>> data_uri(b"abc", "image/png")
    'data:image/png;base64,YWJj'
    """
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def thumbnail(place: str | Path | None, side: int = SIDE) -> bytes | None:
    """Return a picture, as a model sees it, as a small JPEG; None where there is none or it cannot be read."""
    try:
        return None if place is None else small(load_image(place, longest=2 * side), side)
    except ImageError:
        return None


def small(image: Image.Image, side: int = SIDE) -> bytes:
    """Return an RGB picture as a JPEG of at most `side` pixels a side."""
    copy = image.copy()
    copy.thumbnail((side, side))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def fitting(pictures: Sequence[bytes | None], budget: int) -> list[str]:
    """Return JPEGs as URIs ("" for none), all of them smaller by the same measure until they take `budget` characters.

    Below 64 pixels a side they are not made smaller: then they may take more.
    """
    from PIL import Image

    made, side = list(pictures), SIDE
    while sum(len(one) for one in made if one) * 4 // 3 > budget and side > _LEAST:
        side = max(_LEAST, side * 3 // 4)
        made = [small(Image.open(io.BytesIO(one)), side) if one else None for one in pictures]
    return [data_uri(one, "image/jpeg") if one else "" for one in made]
