"""The first records as the model will read them, with what is learnt marked: this finds most data mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from milora_data.conversation import segments_of
from milora_data.encode import encode
from milora_data.records import Record, Turn
from milora_data.templates import IMAGE, Segment, get_template, place_images, render

CHARACTERS_PER_TOKEN = 4  # of English text, where no tokenizer is at hand
SHOWN, LONGEST = 2, 300


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of some records: mean length, mean number of learnt ones, and whether a tokenizer counted them.

    Of packed rows the same, and how many records a row holds.
    """

    tokens: float
    learnt: float
    exact: bool
    records: float = 1.0

    def packed(self, capacity: int) -> Counts:
        """Those of rows of `capacity` tokens that are full of such records.

        >>> Counts(tokens=500, learnt=50, exact=True).packed(2000)
        Counts(tokens=2000, learnt=200.0, exact=False, records=4.0)
        """
        records = max(capacity / max(self.tokens, 1), 1.0)
        return Counts(capacity, self.learnt * records, exact=False, records=records)

    def describe(self) -> str:
        """Per record; an estimate says so."""
        sign = "" if self.exact else "~"
        return f"{sign}{self.tokens:,.0f} tokens a record, {sign}{self.learnt:,.0f} of them learnt"


def count(
    records: Sequence[Record], *, template: str, tokenizer: Any | None, image_tokens: int, max_length: int
) -> Counts:
    """Mean counts over `records`, in the tokenizer's terms or estimated from characters."""
    pairs = [_count_one(r, template, tokenizer, image_tokens, max_length) for r in records]
    tokens, learnt = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return Counts(tokens, learnt, exact=tokenizer is not None)


def lines(records: Sequence[Record], *, template: str, image_tokens: int, tokenizer: Any | None) -> list[str]:
    """The first records as text, one line per piece: `>` before what is learnt, `.` before what is only read."""
    out = []
    for record in records[:SHOWN]:
        out.append(f"{record.source or record.id}  {' '.join(record.images) or '(no picture)'}")
        turns = place_images(record.turns, len(record.images))
        joined: list[tuple[bool, str]] = []
        for segment in _segments(turns, template, tokenizer):
            if joined and joined[-1][0] == segment.learnt:
                joined[-1] = (segment.learnt, joined[-1][1] + segment.text)
            else:
                joined.append((segment.learnt, segment.text))
        for learnt, text in joined:
            out.append(f"  {'>' if learnt else '.'} {_shown(text, image_tokens)}")
    return out


def _count_one(
    record: Record, template: str, tokenizer: Any | None, image_tokens: int, max_length: int
) -> tuple[int, int]:
    if tokenizer is not None:
        encoded = encode(
            record, tokenizer, template=template, image_token_id=-1, image_tokens=image_tokens, max_length=max_length
        )
        return len(encoded.input_ids), sum(label != -100 for label in encoded.labels)
    turns = place_images(record.turns, len(record.images))
    segments = _segments(turns, template, None)
    learnt = sum(len(s.text) // CHARACTERS_PER_TOKEN + 1 for s in segments if s.learnt)
    read = sum(len(s.text.replace(IMAGE, "")) // CHARACTERS_PER_TOKEN + 1 for s in segments if not s.learnt)
    return min(read + learnt + image_tokens * len(record.images), max_length), learnt


def _segments(turns: Sequence[Turn], template: str, tokenizer: Any | None) -> list[Segment]:
    if tokenizer is None:
        return render(turns, get_template(template), "</s>", bos="<s>")
    return segments_of(turns, template, tokenizer)[1]


def _shown(text: str, image_tokens: int) -> str:
    text = text.replace("\n", "\\n").replace(IMAGE, f"<image x {image_tokens}>")
    return text if len(text) <= LONGEST else text[:LONGEST] + f" ... ({len(text):,} characters)"
