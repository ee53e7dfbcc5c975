"""Show the first records as the model reads them, with supervised text marked: this reveals most data mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

from milora_data.batches.record_collator import Countable
from milora_data.encode.templates import Segment, get_template, place_images, render
from milora_data.records.record import IMAGE, Record

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
    has_pictures: bool = True  # any record that was read

    def within(self, max_length: int) -> Counts:
        """Return the counts of the same records, cut to a length.

        >>> Counts(tokens=700, supervised=60, exact=False).within(256).tokens
        256
        """
        return replace(self, tokens=min(self.tokens, max_length), supervised=min(self.supervised, max_length))

    def packed(self, capacity: int) -> Counts:
        """Return the counts of full rows of `capacity` tokens with such records.

        >>> Counts(tokens=500, supervised=50, exact=True).packed(2000)
        Counts(tokens=2000, supervised=200.0, exact=False, records=4.0, has_pictures=True)
        """
        records = max(capacity / max(self.tokens, 1), 1.0)
        return replace(self, tokens=capacity, supervised=self.supervised * records, exact=False, records=records)

    def describe(self) -> str:
        """Return the counts as text; `~` marks an estimate."""
        sign = "" if self.exact else "~"
        return f"{sign}{self.tokens:,.0f} tokens per record, {sign}{self.supervised:,.0f} of them supervised"


def count(records: Sequence[Record], counter: Countable, *, is_exact: bool) -> Counts:
    """Return mean counts over `records`, from a collator (`is_exact`) or an `Estimate`."""
    tokens = sum(map(counter.num_tokens, records)) / len(records)
    return Counts(tokens, sum(map(counter.num_supervised, records)) / len(records), is_exact)


def lines(records: Sequence[Record], counter: Countable, image_tokens: int) -> list[str]:
    """Return the first records as text, one line per segment: `>` marks supervised text, `.` other text.

    `image_tokens` is the number of tokens of an image, or 0 where it depends on the image.
    """
    out = []
    for record in records[:SHOWN]:
        out.append(f"{record.source or record.id}  {' '.join(record.images) or '(no image)'}")
        for supervised, pieces in groupby(counter.segments(record), attrgetter("supervised")):
            text = "".join(piece.text for piece in pieces).replace("\n", "\\n")
            text = text.replace(IMAGE, f"<image x {image_tokens}>" if image_tokens else IMAGE)
            out.append(f"  {'>' if supervised else '.'} {_shortened(text)}")
    return out


@dataclass(frozen=True, slots=True)
class Estimate:
    """Counts of records without a tokenizer, from characters, in one of our templates."""

    template: str
    image_tokens: int
    max_length: int

    def num_tokens(self, record: Record) -> int:
        """Return the estimated number of tokens, at most `max_length`."""
        tokens = sum(_estimated(segment.text.replace(IMAGE, "")) for segment in self.segments(record))
        return min(tokens + self.image_tokens * len(record.images), self.max_length)

    def num_supervised(self, record: Record) -> int:
        """Return the estimated number of supervised tokens."""
        return sum(_estimated(segment.text) for segment in self.segments(record) if segment.supervised)

    def segments(self, record: Record) -> list[Segment]:
        """Return the text of a record in pieces, supervised or not."""
        turns = place_images(record.turns, len(record.images))
        return render(turns, get_template(self.template), "</s>", bos="<s>")


def _estimated(text: str) -> int:
    return len(text) // CHARACTERS_PER_TOKEN + 1


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + f" ... ({len(text):,} characters)"
