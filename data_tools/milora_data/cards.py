"""Cards: a question with its small pictures and the answers to it, as every page shows it; licences of pictures."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_data.pictures.load import ImageError, PictureFile, load_image
from milora_vl.common.cli.page import MAX_BYTES, render, write

if TYPE_CHECKING:
    from PIL import Image

SIDE, _LEAST = 320, 64  # pixels of thumbnails; shown at half this size on high-density screens


@dataclass(frozen=True, slots=True)
class Card:
    """The content of one card: `text` has pieces, each with a style (question, context, learnt, given, picture).

    `pictures` has a caption and a small JPEG (None: cannot be shown) for each. `answers` are (who, text, how much of it
    is right, or None). A page filters its cards by `kinds`.
    """

    title: str
    text: Sequence[tuple[str, str]]
    pictures: Sequence[tuple[str, Any]] = ()
    answers: Sequence[tuple[str, str, float | None]] = ()
    kinds: Sequence[str] = ()


def fitted(cards: Sequence[Card], budget: int) -> list[Card]:
    """Return the cards with their pictures as URIs ("" for none), which take at most `budget` characters."""
    uris = iter(fitting([jpeg for card in cards for _, jpeg in card.pictures], budget))
    return [replace(card, pictures=[(caption, next(uris)) for caption, _ in card.pictures]) for card in cards]


def write_cards(
    page: Path, cards: Sequence[Card], *, kind: str, title: str, lede: str, note: str, credited: Iterable[Path]
) -> None:
    """Write a page of cards that can be filtered and searched, with the licences that the `credited` folders name."""
    text = sum(len(str((card.text, card.answers))) + 400 for card in cards)
    content = {
        "kind": kind,
        "title": title,
        "lede": lede,
        "note": note,
        "cards": fitted(cards, max(MAX_BYTES * 9 // 10 - text, MAX_BYTES // 3)),
        "credits": credit_lines(credited),
    }
    write(page, render(Path(__file__).with_name("cards.html.j2"), content))


def data_uri(content: bytes, mime: str) -> str:
    """Return the bytes as a URI that can be embedded in a page.

    >>> data_uri(b"abc", "image/png")
    'data:image/png;base64,YWJj'
    """
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def thumbnail(path: PictureFile | None, side: int = SIDE) -> bytes | None:
    """Return a picture, loaded like a model's input, as a small JPEG; None if it is missing or cannot be read."""
    try:
        return None if path is None else small(load_image(path), side)
    except ImageError:
        return None


def small(image: Image.Image, side: int = SIDE) -> bytes:
    """Return an RGB picture as a JPEG of at most `side` pixels per side."""
    copy = image.copy()
    copy.thumbnail((side, side))
    buffer = BytesIO()
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
        resized = [small(Image.open(BytesIO(one)), side) if one else None for one in pictures]
    return [data_uri(one, "image/jpeg") if one else "" for one in resized]


def credit_lines(folders: Iterable[Path]) -> list[str]:
    """Return the lines that mention a licence in the README.md of each folder, without repeats."""
    readmes = dict.fromkeys((folder / "README.md").resolve() for folder in folders)
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in readmes if file.is_file())
    lines = (line.strip(" *-").replace("`", "") for text in texts for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if re.search(r"\blicen[cs]e\b", line, re.IGNORECASE)))
