"""Show the first records as the model reads them, with supervised text marked: this reveals most data mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from milora_data.batches.processor_collate import ProcessorCollator
from milora_data.encode.chat_template import segments_of
from milora_data.encode.labels import encode
from milora_data.encode.templates import Segment, get_template, place_images, render
from milora_data.encode.tokens import IGNORE
from milora_data.records.record import IMAGE, Record, tools_of

CHARACTERS_PER_TOKEN = 4  # of English text; used without a tokenizer
SHOWN, LONGEST = 2, 300


@dataclass(frozen=True, slots=True)
class Counts:
    """Mean tokens and mean supervised tokens per record, and whether a tokenizer counted them (`exact`).

    For packed rows the same per row, with `records` per row.
    """

    tokens: float
    supervised: float
    exact: bool
    records: float = 1.0

    def within(self, max_length: int) -> Counts:
        """Return the counts of the same records, cut to a length.

        >>> Counts(tokens=700, supervised=60, exact=False).within(256).tokens
        256
        """
        return replace(self, tokens=min(self.tokens, max_length), supervised=min(self.supervised, max_length))

    def packed(self, capacity: int) -> Counts:
        """Return the counts of full rows of `capacity` tokens with such records.

        >>> Counts(tokens=500, supervised=50, exact=True).packed(2000)
        Counts(tokens=2000, supervised=200.0, exact=False, records=4.0)
        """
        records = max(capacity / max(self.tokens, 1), 1.0)
        return Counts(capacity, self.supervised * records, exact=False, records=records)

    def describe(self) -> str:
        """Return the counts as text; `~` marks an estimate."""
        sign = "" if self.exact else "~"
        return f"{sign}{self.tokens:,.0f} tokens per record, {sign}{self.supervised:,.0f} of them supervised"


def count(
    records: Sequence[Record], *, template: str, tokenizer: Any | None, image_tokens: int, max_length: int
) -> Counts:
    """Return mean counts over `records`, from the tokenizer or estimated from characters."""
    pairs = [_count_one(r, template, tokenizer, image_tokens, max_length) for r in records]
    tokens, supervised = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return Counts(tokens, supervised, exact=tokenizer is not None)


def count_with_processor(records: Sequence[Record], collate: ProcessorCollator) -> Counts:
    """Return mean counts over `records` for a model whose processor prepares the pictures."""
    tokens = sum(collate.lengths(records)) / len(records)
    return Counts(tokens, sum(map(collate.num_supervised, records)) / len(records), exact=True)


def lines(records: Sequence[Record], *, template: str, image_tokens: int, tokenizer: Any | None) -> list[str]:
    """Return the first records as text, one line per segment: `>` marks supervised text, `.` other text."""

    def segments(record: Record) -> list[Segment]:
        return _segments(record, template, tokenizer)

    return _shown_records(records, segments, f"<image x {image_tokens}>")


def lines_with_processor(records: Sequence[Record], collate: ProcessorCollator) -> list[str]:
    """Return the first records like `lines`, for a model whose processor prepares the pictures."""
    return _shown_records(records, collate.segments, IMAGE)


def _shown_records(
    records: Sequence[Record], segments_of_record: Callable[[Record], list[Segment]], picture: str
) -> list[str]:
    out = []
    for record in records[:SHOWN]:
        out.append(f"{record.source or record.id}  {' '.join(record.images) or '(no image)'}")
        joined: list[tuple[bool, str]] = []
        for segment in segments_of_record(record):
            if joined and joined[-1][0] == segment.supervised:
                joined[-1] = (segment.supervised, joined[-1][1] + segment.text)
            else:
                joined.append((segment.supervised, segment.text))
        for supervised, text in joined:
            out.append(f"  {'>' if supervised else '.'} {_shown(text, picture)}")
    return out


def _count_one(
    record: Record, template: str, tokenizer: Any | None, image_tokens: int, max_length: int
) -> tuple[int, int]:
    if tokenizer is not None:
        encoded = encode(
            record, tokenizer, template=template, image_token_id=-1, image_tokens=image_tokens, max_length=max_length
        )
        return len(encoded.input_ids), sum(label != IGNORE for label in encoded.labels)
    segments = _segments(record, template, None)
    supervised = sum(len(s.text) // CHARACTERS_PER_TOKEN + 1 for s in segments if s.supervised)
    context = sum(len(s.text.replace(IMAGE, "")) // CHARACTERS_PER_TOKEN + 1 for s in segments if not s.supervised)
    return min(context + supervised + image_tokens * len(record.images), max_length), supervised


def _segments(record: Record, template: str, tokenizer: Any | None) -> list[Segment]:
    turns = place_images(record.turns, len(record.images))
    if tokenizer is None:
        return render(turns, get_template(template), "</s>", bos="<s>")
    return segments_of(turns, template, tokenizer, tools=tools_of(record))[1]


def _shown(text: str, picture: str) -> str:
    text = text.replace("\n", "\\n").replace(IMAGE, picture)
    return text if len(text) <= LONGEST else text[:LONGEST] + f" ... ({len(text):,} characters)"
