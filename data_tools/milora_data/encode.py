"""Conversations to token ids and labels, by segments: the mask is known while the text is put together.

Equal to LLaVA's `preprocess_v1`, `preprocess_plain` and `preprocess_llama_2` (llava/train/train.py) on well-formed
records, without their re-counting, which masks a whole conversation as soon as a count is off by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_data.conversation import segments_of
from milora_data.errors import DataError
from milora_data.records import Record, Turn, parse_record
from milora_data.templates import IMAGE, Segment, place_images
from milora_data.tokens import IGNORE, Habits, habits
from milora_data.words import words_of


class NothingToLearn(DataError):
    """A record without a single target: it has no answer, or `max_length` cut all of them off."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels of one conversation, equally long; labels are -100 where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]
    num_images: int
    """Pictures whose tokens are in `input_ids`: less than the record has where `max_length` cut some off."""
    num_cut: int = 0
    """Tokens that `max_length` cut off."""


def encode(
    record: Record | Mapping[str, Any],
    tokenizer: Any,
    *,
    template: str = "vicuna_v1",
    image_token_id: int,
    image_tokens: int | Sequence[int] = 576,
    max_length: int | None = None,
) -> Encoded:
    """Return ids and labels of `record` (a `Record` or a LLaVA dict) for training.

    Each picture becomes `image_tokens` copies of `image_token_id` (a list gives one count per picture); 1 and -200 give
    LLaVA's own ids. What exceeds `max_length` is cut off at the end, a picture as a whole.
    Raises `DataError`, with file and line where they are known: turns out of order, more or fewer `<image>` than
    pictures, nothing left to learn.
    """
    record = record if isinstance(record, Record) else parse_record(record)
    try:
        turns = place_images(record.turns, len(record.images))
        knows = habits(tokenizer)
        bos, segments = segments_of(turns, template, tokenizer, knows=knows)
        encoded = _join(_tokenize(segments, tokenizer, knows), bos, image_token_id, image_tokens, max_length)
        if encoded.labels.count(IGNORE) == len(encoded.labels):
            cut = f"; max_length {max_length} cuts off {encoded.num_cut} tokens" if encoded.num_cut else ""
            raise NothingToLearn(f"no answer to learn from in this record{cut}")
    except DataError as error:
        raise type(error)(f"{record.source or f'record {record.id!r}'}: {error}") from None
    return encoded


def encode_prompt(
    record_or_turns: Record | Mapping[str, Any] | Sequence[Turn],
    tokenizer: Any,
    *,
    template: str = "vicuna_v1",
    image_token_id: int,
    image_tokens: int | Sequence[int] = 576,
) -> list[int]:
    """Return the ids after which a model answers: all turns so far, then `ASSISTANT:`. A last answer is left out.

    Raises `DataError` like `encode`; with turns alone, the number of pictures is not known and not compared.
    """
    if isinstance(record_or_turns, Mapping):
        record_or_turns = parse_record(record_or_turns)
    record = record_or_turns if isinstance(record_or_turns, Record) else Record("", (), tuple(record_or_turns))
    turns = list(record.turns[:-1] if record.turns and record.turns[-1].role == "assistant" else record.turns)
    if not turns or turns[-1].role != "user":
        raise DataError(f"{record.source or 'prompt'}: the last turn must be a question")
    num_images = len(record.images) if record is record_or_turns else None
    try:
        knows = habits(tokenizer)
        bos, segments = segments_of(place_images(turns, num_images), template, tokenizer, prompt=True, knows=knows)
    except DataError as error:
        raise DataError(f"{record.source or 'prompt'}: {error}") from None
    return _join(_tokenize(segments, tokenizer, knows), bos, image_token_id, image_tokens).input_ids


def _tokenize(segments: Sequence[Segment], tokenizer: Any, knows: Habits) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of each stretch of text between two pictures.

    A stretch is tokenized as a whole and alone, as LLaVA does: pieces may join across segments (never across a
    picture), and the offsets say which piece belongs to which segment. Where a text may be cut (not with SentencePiece)
    each answer is tokenized alone, so that the prompt has the same pieces in training as when the model is asked.
    """
    texts, spans = [""], [[]]  # type: tuple[list[str], list[list[tuple[int, int]]]]
    for text, learnt in segments:
        for number, part in enumerate(text.split(IMAGE)):
            if number:
                texts.append("")
                spans.append([])
            if learnt:
                spans[-1].append((len(texts[-1]), len(texts[-1]) + len(part)))
            texts[-1] += part
    try:
        if not knows.blank:
            return [_in_parts(text, learnt, knows.backend) for text, learnt in zip(texts, spans, strict=True)]
        words = words_of(tokenizer, knows.backend)
        return [
            (words.encode(text, learnt) if words.usable else None) or _whole(text, learnt, knows.backend)
            for text, learnt in zip(texts, spans, strict=True)
        ]
    except TypeError:  # what the Rust side says to a text that UTF-8 cannot hold
        raise DataError("a text is no valid Unicode: it holds half of a surrogate pair (\\ud800 to \\udfff)") from None


def _in_parts(text: str, spans: Sequence[tuple[int, int]], backend: Any) -> tuple[list[int], list[int]]:
    """Return ids and labels of one text, of which the characters of `spans` are learnt, each tokenized alone."""
    ids: list[int] = []
    labels: list[int] = []
    at = 0
    for start, end in [*spans, (len(text), len(text))]:
        given = backend.encode(text[at:start], add_special_tokens=False).ids
        learnt = backend.encode(text[start:end], add_special_tokens=False).ids
        ids += given + learnt
        labels += [IGNORE] * len(given) + learnt
        at = end
    return ids, labels


def _whole(text: str, spans: Sequence[tuple[int, int]], backend: Any) -> tuple[list[int], list[int]]:
    """Return ids and labels of one text, of which the characters of `spans` are learnt."""
    encoding = backend.encode(text, add_special_tokens=False)
    ids = encoding.ids
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        first, last = _piece(encoding, start, text), _piece(encoding, end, text)
        for place, edge in ((first, start), (last, end)):
            if place < len(ids) and encoding.token_to_chars(place)[0] < edge:
                return _cut(text, spans, edge, backend)  # one piece on both sides, such as "><"
        labels[first:last] = ids[first:last]
    return ids, labels


def _piece(encoding: Any, character: int, text: str) -> int:
    """Return the place of the first piece that holds a character, or a later one if none does."""
    for place in range(character, len(text)):
        found = encoding.char_to_token(place)
        if found is not None:
            return int(found)
    return len(encoding)


def _cut(text: str, spans: Sequence[tuple[int, int]], edge: int, backend: Any) -> tuple[list[int], list[int]]:
    before = [(start, min(end, edge)) for start, end in spans if start < edge]
    after = [(max(start, edge) - edge, end - edge) for start, end in spans if end > edge]
    ids, labels = _whole(text[:edge], before, backend)
    more_ids, more_labels = _whole(text[edge:], after, backend)
    return ids + more_ids, labels + more_labels


def _join(
    stretches: Sequence[tuple[list[int], list[int]]],
    bos: list[int],
    image_token_id: int,
    image_tokens: int | Sequence[int],
    max_length: int | None = None,
) -> Encoded:
    num_images = len(stretches) - 1
    counts = [image_tokens] * num_images if isinstance(image_tokens, int) else list(image_tokens)
    if len(counts) != num_images:
        raise DataError(f"image_tokens has {len(counts)} counts for {num_images} pictures")
    input_ids, labels = list(bos), [IGNORE] * len(bos)
    pictures: list[tuple[int, int]] = []
    for count, (ids, targets) in zip([0, *counts], stretches, strict=True):
        pictures.append((len(input_ids), len(input_ids) + count))
        input_ids += [image_token_id] * count + ids
        labels += [IGNORE] * count + targets
    end = len(input_ids) if max_length is None else min(max_length, len(input_ids))
    kept = [picture for picture in pictures[1:] if picture[1] <= end]
    if len(kept) < num_images:
        end = min(end, pictures[1 + len(kept)][0])
    return Encoded(input_ids[:end], labels[:end], len(kept), len(input_ids) - end)
