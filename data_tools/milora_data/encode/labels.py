"""Encode a conversation to token ids and labels: the label (loss) mask, picture tokens, truncation at max_length.

The text is rendered as segments that are either supervised or not, so the loss mask is known before tokenization.
The result equals LLaVA's `preprocess_v1`, `preprocess_plain` and `preprocess_llama_2` (llava/train/train.py) on
well-formed records. LLaVA tokenizes the rounds again to count their tokens, and masks a whole conversation if one count
is off by one; this module does not count.

The steps, for a record with one picture and the template `vicuna_v1`:

1. `segments_of` renders the text in pieces: "... USER: <image> What is this? ASSISTANT:" is not supervised,
   " A cat.</s>" is.
2. `_tokenize` splits the text at `<image>` and tokenizes each stretch. A token of a supervised piece is its own label;
   all other tokens get -100, which the loss ignores.
3. `_join` puts the tokens of a picture between two stretches and cuts at `max_length`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_data.encode.chat_template_mask import segments_of
from milora_data.encode.templates import Segment, images_first, no_videos
from milora_data.encode.tokens import IGNORE, TokenizerTraits, tokenizer_traits, words_of
from milora_data.records import parse_record
from milora_data.records.record import IMAGE, Record, Turn
from milora_vl.common.cli.console import amount
from milora_vl.common.errors import DataError, with_context


class NoSupervisedTokens(DataError):
    """The record has no answer, or `max_length` cuts all answers off."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels of one conversation, of equal length; labels are -100 for unsupervised tokens."""

    input_ids: list[int]
    labels: list[int]
    num_images: int
    """Pictures whose tokens are in `input_ids`; fewer than the record has if `max_length` cuts some off."""
    num_cut: int = 0
    """Tokens that `max_length` cuts off."""


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

    Each picture becomes `image_tokens` copies of `image_token_id` (a list has one count per picture); 1 and -200 give
    LLaVA's own ids. Tokens beyond `max_length` are cut off at the end; a picture is never cut in two.
    Raises `DataError`, with file and line if they are known, if turns are out of order, if the number of `<image>`
    differs from the number of pictures, or if no supervised token is left.

    >>> from milora_vl.models.tiny import tiny_tokenizer
    >>> turns = [{"from": "human", "value": "<image>Is it red?"}, {"from": "gpt", "value": "Yes."}]
    >>> record = {"image": "a.png", "conversations": turns}
    >>> encoded = encode(record, tiny_tokenizer(), image_token_id=-200, image_tokens=3)
    >>> encoded.input_ids.count(-200), encoded.num_images
    (3, 1)
    >>> tiny_tokenizer().decode([label for label in encoded.labels if label != IGNORE])
    ' Yes.</s>'
    """
    record = record if isinstance(record, Record) else parse_record(record)
    try:
        traits = tokenizer_traits(tokenizer)
        bos, segments = record_segments(record, tokenizer, template, traits)
        encoded = _join(_tokenize(segments, traits), bos, image_token_id, image_tokens, max_length)
        if encoded.labels.count(IGNORE) == len(encoded.labels):
            lost = amount(encoded.num_cut, "token")
            cut = f": max_length {max_length} cuts off the last {lost}" if encoded.num_cut else ""
            raise NoSupervisedTokens(
                f"this record has no supervised answer{cut}",
                code="record-no-answer",
                hint="a larger --max_length keeps it" if cut else "",
            )
    except DataError as error:
        raise with_context(error, record.place) from None
    return encoded


def record_segments(
    record: Record, tokenizer: Any, template: str, traits: TokenizerTraits | None = None
) -> tuple[list[int], list[Segment]]:
    """Return the ids before a record (BOS, or none) and its segments, with `<image>` in place of each picture."""
    if record.videos:
        raise no_videos("this model")
    return segments_of(images_first(record.turns, len(record.images)), template, tokenizer, traits=traits)


def encode_prompt(
    record_or_turns: Record | Mapping[str, Any] | Sequence[Turn],
    tokenizer: Any,
    *,
    template: str = "vicuna_v1",
    image_token_id: int,
    image_tokens: int | Sequence[int] = 576,
) -> list[int]:
    """Return the ids from which a model generates: all turns so far, then `ASSISTANT:`. A last answer is dropped.

    Raises `DataError` like `encode`. Turns without a record do not name pictures, so their number is not checked.
    """
    if isinstance(record_or_turns, Mapping):
        record_or_turns = parse_record(record_or_turns)
    record = record_or_turns if isinstance(record_or_turns, Record) else Record("", (), tuple(record_or_turns))
    turns = list(record.turns[:-1] if record.turns and record.turns[-1].role == "assistant" else record.turns)
    where = record.source or "prompt"
    if not turns or turns[-1].role not in ("user", "tool"):
        raise DataError("the last turn must be a question, or the result of a tool", where=where)
    num_images = len(record.images) if record is record_or_turns else None
    try:
        traits, turns = tokenizer_traits(tokenizer), images_first(turns, num_images)
        bos, segments = segments_of(turns, template, tokenizer, prompt=True, traits=traits)
    except DataError as error:
        raise with_context(error, where) from None
    return _join(_tokenize(segments, traits), bos, image_token_id, image_tokens).input_ids


def _tokenize(segments: Sequence[Segment], traits: TokenizerTraits) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of each stretch of text between two pictures.

    Each stretch is tokenized alone, as in LLaVA: tokens may span segments but never a picture. Character offsets assign
    tokens to segments.
    """
    # A picture ends a stretch. `spans` holds the supervised character ranges of each stretch.
    texts, spans = [""], [[]]  # type: tuple[list[str], list[list[tuple[int, int]]]]
    for text, supervised in segments:
        for number, part in enumerate(text.split(IMAGE)):
            if number:
                texts.append("")
                spans.append([])
            if supervised:
                spans[-1].append((len(texts[-1]), len(texts[-1]) + len(part)))
            texts[-1] += part
    try:
        if not traits.blank:
            # A byte-level BPE may merge the end of the prompt with the start of the answer. At inference the prompt is
            # tokenized without an answer, so the answer is tokenized alone in training too.
            return [_in_parts(text, ranges, traits.backend) for text, ranges in zip(texts, spans, strict=True)]
        # SentencePiece puts a blank in front of every text that it tokenizes: a cut would add one inside the text.
        words = words_of(traits.backend, traits.backend.get_vocab_size())
        return [
            (words.encode(text, ranges) if words.usable else None) or _whole(text, ranges, traits.backend)
            for text, ranges in zip(texts, spans, strict=True)
        ]
    except TypeError:  # the Rust tokenizer raises it for text that UTF-8 cannot represent
        raise DataError(
            "a text is not valid Unicode: it contains half of a surrogate pair (\\ud800 to \\udfff)",
            hint="remove the character, or write the file again as UTF-8",
        ) from None


def _in_parts(text: str, spans: Sequence[tuple[int, int]], backend: Any) -> tuple[list[int], list[int]]:
    """Return ids and labels of one text; each supervised range of characters in `spans` is tokenized alone."""
    ids: list[int] = []
    labels: list[int] = []
    at = 0
    for start, end in [*spans, (len(text), len(text))]:
        context = backend.encode(text[at:start], add_special_tokens=False).ids
        target = backend.encode(text[start:end], add_special_tokens=False).ids
        ids += context + target
        labels += [IGNORE] * len(context) + target
        at = end
    return ids, labels


def _whole(text: str, spans: Sequence[tuple[int, int]], backend: Any) -> tuple[list[int], list[int]]:
    """Return ids and labels of one text that is tokenized in one call; `spans` are its supervised characters.

    "a b</s>" with the span (1, 7) gives ids [a, _b, </s>] and labels [-100, _b, </s>].
    """
    encoding = backend.encode(text, add_special_tokens=False)
    ids = encoding.ids
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        first, last = _token_at(encoding, start, text), _token_at(encoding, end, text)
        for token, edge in ((first, start), (last, end)):
            if token < len(ids) and encoding.token_to_chars(token)[0] < edge:
                # One token covers both sides of the edge, such as "><". It has no correct label, so cut the text there.
                return _cut(text, spans, edge, backend)
        labels[first:last] = ids[first:last]
    return ids, labels


def _token_at(encoding: Any, character: int, text: str) -> int:
    """Return the index of the token that contains a character, or of the next token if none contains it."""
    for index in range(character, len(text)):
        token = encoding.char_to_token(index)
        if token is not None:
            return int(token)
    return len(encoding)


def _cut(text: str, spans: Sequence[tuple[int, int]], edge: int, backend: Any) -> tuple[list[int], list[int]]:
    """Return ids and labels of a text whose parts before and after the character `edge` are tokenized separately."""
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
    """Return BOS and the stretches with the tokens of one picture between two of them, cut to `max_length`.

    >>> stretches = [([5], [IGNORE]), ([6, 7], [6, 7])]  # text before and after one picture
    >>> _join(stretches, [1], image_token_id=9, image_tokens=2)
    Encoded(input_ids=[1, 5, 9, 9, 6, 7], labels=[-100, -100, -100, -100, 6, 7], num_images=1, num_cut=0)
    >>> _join(stretches, [1], image_token_id=9, image_tokens=2, max_length=3)  # would cut the picture in two
    Encoded(input_ids=[1, 5], labels=[-100, -100], num_images=0, num_cut=4)
    """
    num_images = len(stretches) - 1
    counts = [image_tokens] * num_images if isinstance(image_tokens, int) else list(image_tokens)
    if len(counts) != num_images:
        raise DataError(
            f"image_tokens has {len(counts)} counts for {num_images} pictures",
            hint="give one count for each picture of the conversation",
        )
    input_ids, labels = list(bos), [IGNORE] * len(bos)
    pictures: list[tuple[int, int]] = []
    for count, (ids, targets) in zip([0, *counts], stretches, strict=True):
        pictures.append((len(input_ids), len(input_ids) + count))
        input_ids += [image_token_id] * count + ids
        labels += [IGNORE] * count + targets
    end = len(input_ids) if max_length is None else min(max_length, len(input_ids))
    # The model needs all tokens of a picture or none: if the cut falls into a picture, move it to the picture's start.
    kept = [picture for picture in pictures[1:] if picture[1] <= end]
    if len(kept) < num_images:
        end = min(end, pictures[1 + len(kept)][0])
    return Encoded(input_ids[:end], labels[:end], len(kept), len(input_ids) - end)
