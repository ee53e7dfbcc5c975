"""A record as training sees it: its text in pieces that are learnt, shown, or stand for a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from milora_data.encode import IGNORE, Encoded
from milora_data.errors import DataError
from milora_data.records import Record
from milora_data.templates import IMAGE, get_template, place_images, render

if TYPE_CHECKING:
    from rich.text import Text

STYLES = {"learnt": "bold green", "given": "", "picture": "magenta"}


class Piece(NamedTuple):
    """A stretch of text: `learnt` is a target, `given` is not, `picture` stands for the tokens of one."""

    kind: Literal["learnt", "given", "picture"]
    text: str


def text_pieces(record: Record, *, template: str = "vicuna_v1", eos: str = "</s>") -> list[Piece]:
    """Return the pieces of a record without a tokenizer. Raises `DataError` with file and line, as `encode` does."""
    try:
        segments = render(place_images(record.turns, len(record.images)), get_template(template), eos, bos="<s>")
    except DataError as error:
        raise DataError(f"{record.source or f'record {record.id!r}'}: {error}") from None
    pieces = []
    for text, learnt in segments:
        for number, part in enumerate(text.split(IMAGE)):
            pieces += [Piece("picture", IMAGE)] * bool(number)
            pieces += [Piece("learnt" if learnt else "given", part)] * bool(part)
    return _joined(pieces)


def token_pieces(encoded: Encoded, tokenizer: Any, image_token_id: int) -> list[Piece]:
    """Return the pieces of an encoded record, decoded from its very ids: what the model gets and is asked for."""

    def kind(pair: tuple[int, int]) -> Literal["learnt", "given", "picture"]:
        token, label = pair
        return "picture" if token == image_token_id else "given" if label == IGNORE else "learnt"

    made, text_ids, before = [], [], ""
    for name, group in groupby(zip(encoded.input_ids, encoded.labels, strict=True), key=kind):
        ids = [token for token, _ in group]
        if name == "picture":
            made.append(Piece(name, f"<image x {len(ids)}>"))
            continue
        # Decoded alone, a stretch would lose its leading blank.
        text_ids += ids
        text = tokenizer.decode(text_ids)
        made.append(Piece(name, text[len(before) :]))
        before = text
    return made


def as_rich(pieces: Sequence[Piece]) -> Text:
    """Return the pieces for a terminal; what is learnt stands in [[ ]], so that it is seen without colours too."""
    from rich.text import Text

    shown = [(f"[[{text}]]" if kind == "learnt" else text, STYLES[kind]) for kind, text in pieces]
    return Text.assemble(*shown)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    made: list[Piece] = []
    for piece in pieces:
        if made and made[-1].kind == piece.kind != "picture":
            made[-1] = Piece(piece.kind, made[-1].text + piece.text)
        else:
            made.append(piece)
    return made
