"""A record as training sees it: pieces of supervised text, of other text, and of picture tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from milora_data.encode.labels import IGNORE, Encoded
from milora_data.encode.templates import get_template, place_images, render
from milora_data.records.record import IMAGE, Record
from milora_vl.base.errors import DataError, with_context

if TYPE_CHECKING:
    from rich.text import Text

STYLES = {"learnt": "bold green", "given": "", "picture": "magenta"}  # keys of the JSON output
COUNTS = {"tokens": "tokens", "learnt": "supervised", "of_pictures": "of pictures", "cut": "cut"}
"""Keys of the counts in the JSON output, and their names in texts."""


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
