"""Collate records with a model's own processor: the loss mask from character offsets, substitutes for broken pictures.

The processor expands the placeholder of each picture and returns the tensors of its family; all of them are passed on
under their own names, batched as the processor batches them. The loss mask is computed from characters: the chat
template gives the supervised ranges of the text (chat_template_mask.py), the processor the offsets of the tokens.

A token is supervised if one of its characters is, and no token of a picture is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from milora_data.batches.pack import RowPacker, with_hidden_picture
from milora_data.batches.processor_inputs import PROCESSOR_ERRORS, SPANS, ProcessorInputs, with_unseen_pictures
from milora_data.batches.record_collator import RecordCollator, RecordLike, needed_by, pad_id_of, record_of
from milora_data.encode.chat_template_mask import VIDEO_MARK, Rendered
from milora_data.encode.labels import NoSupervisedTokens
from milora_data.encode.templates import Segment
from milora_data.encode.tokens import IGNORE
from milora_data.pictures.load import ImageError, ImagePolicy, Picture, load_image
from milora_data.pictures.videos import Frames
from milora_data.records.boxes import Boxes, require_no_boxes
from milora_data.records.record import IMAGE, VIDEO, Record, Turn, Video
from milora_vl.common.cli.console import amount
from milora_vl.common.errors import DataError, UserError, first_line, with_context, with_problems

log = logging.getLogger(__name__)

_NOT_FOR_THE_MODEL = ("offset_mapping", SPANS)
_NUM_CUTS = 16
BATCH_OF_ONE = (
    "use --per_device_train_batch_size 1 and --gradient_accumulation_steps without --packing, or records of one kind"
)


@dataclass(frozen=True, slots=True)
class ProcessorSample:
    """One record as text, with its pictures (PIL). `is_cut`: max_length shortened it.

    `row` is the number of its row in a packed batch.
    """

    record: Record
    rendered: Rendered
    images: tuple[Any, ...]
    videos: tuple[Frames, ...] = ()
    is_cut: bool = False
    row: int = 0

    @property
    def where(self) -> str:
        return self.record.place


class ProcessorCollator(RecordCollator[ProcessorSample]):
    """Collates records (`Record`, or dicts) into a batch with a model's processor; usable as `data_collator`.

    `__call__` returns input_ids, attention_mask and labels (batch, length), padded on the right, and every other tensor
    that the processor returns. Labels of unsupervised tokens are -100. Records without pictures may be mixed in; where
    several processes train, a batch without any gets a plain picture, hidden from attention and from the loss.
    A record beyond `max_length` is cut at its end, never within a picture. `RecordCollator` explains `bad_images` and
    `substitutes`; a picture that the processor refuses counts as unreadable.

    A list of records in place of a record is packed into one row (`RowPacker`), if `model_config`, the config of
    the model, is given; `packing` is its layout.

    Raises `UserError` for a processor without a chat template or a documented plain prompt, and for a version of
    transformers whose processors do not return the spans of pictures.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_folder: str | Path | None = None,
        max_length: int | None = None,
        bad_images: ImagePolicy = "raise",
        pad_to_multiple_of: int | None = None,
        substitutes: Sequence[RecordLike] = (),
        model_config: Any = None,
        packing: Literal["rows", "flat"] = "rows",
    ) -> None:
        super().__init__(bad_images, substitutes, image_folder=image_folder, max_length=max_length)
        # ZeRO-3 and FSDP2 gather the vision tower on all processes together: none may skip it.
        self.always_shows_images = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.inputs = ProcessorInputs(processor)
        self.boxes = Boxes.of(processor)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.model_config = model_config
        self.packing = packing

    def full_length(self, record: Record) -> int:
        rendered, videos = self._rendered(record), record.within(self.image_folder).videos
        return self.inputs.num_tokens(rendered, list(map(self._size, record.images)), videos)

    def num_supervised(self, record: Record) -> int:
        rendered = self._rendered(record)
        answers = [rendered.text[start:end] for start, end in rendered.supervised]
        if rendered.suffix is not None:
            answers.append(rendered.suffix)
        return sum(len(self.inputs.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers)

    def segments(self, record: Record) -> list[Segment]:
        rendered, end, pieces = self._rendered(record), 0, []
        for start, stop in rendered.supervised:
            pieces += [Segment(rendered.text[end:start], False), Segment(rendered.text[start:stop], True)]
            end = stop
        pieces += [Segment(rendered.text[end:], False), Segment(rendered.suffix or "", True)]
        shown = [piece._replace(text=piece.text.replace(self.inputs.placeholder, IMAGE)) for piece in pieces]
        if record.videos:
            token = str(self.inputs.video_placeholder)
            shown = [piece._replace(text=piece.text.replace(token, VIDEO)) for piece in shown]
        return [piece for piece in shown if piece.text]

    def length_settings(self) -> str:
        from transformers import __version__

        processor, backend = self.inputs.processor, self.inputs.tokenizer.backend_tokenizer
        return f"{__version__}\0{processor!r}\0{processor.chat_template!r}\0{backend.to_str()}"

    def kind(self, record: Record) -> tuple[bool, tuple[int, ...]]:
        """Return whether a record has images, and the numbers of frames of its videos, each once and in order."""
        return bool(record.images), tuple(sorted(set(self.num_frames(record))))

    def may_refuse(self, record: Record) -> bool:
        marks = record.turns, len(record.images), len(record.videos)
        return super().may_refuse(record) or self.inputs.may_refuse(*marks)

    def require_one_batch(self, records: Sequence[Record]) -> None:
        with_images = [record for record in records if record.images]
        without = [record for record in records if not record.images]
        if with_images and without and not (self.inputs.takes_mixed_rows or self.inputs.by_cross_attention):
            name = type(self.inputs.processor).__name__
            message = f"{name} cannot put records with and without pictures into one batch"
            where = f"{with_images[0].place} and {without[0].place}"
            raise DataError(message, code="records-mixed", where=where)
        frames = [count for record in records for count in self.num_frames(record)]
        try:
            self.inputs.require_one_kind(len(with_images), frames)
        except DataError as error:
            shown = [record for record in records if record.files]
            raise with_context(error, " and ".join(record.place for record in shown[:2])) from None

    def _rendered(self, record: Record) -> Rendered:
        record = self._with_boxes(record)
        try:
            turns = with_video_marks(record.turns, len(record.images), len(record.videos))
            form = self.inputs.video_format if record.videos else self.inputs.format
            rendered = form.render(turns)
            self.inputs.require_images(rendered.text, len(record.images), len(record.videos))
            self.inputs.require_one_kind(len(record.images), self.num_frames(record))
            if not rendered.supervised and rendered.suffix is None:
                raise NoSupervisedTokens("this record has no supervised answer", code="record-no-answer")
        except DataError as error:
            raise with_context(error, record.place) from None
        return rendered

    def _samples(self, items: Sequence[RecordLike]) -> list[ProcessorSample]:
        """Return the samples of the items; all texts first, which take twice as long between decoders of pictures."""
        texts: list[tuple[Record, Rendered]] = []
        for item in items:
            record = self._kept(record_of, item, "")
            rendered = None if record is None else self._kept(self._rendered, record, record.place)
            if record is not None and rendered is not None:
                texts.append((record, rendered))
        return _present(self._kept(self._with_images, text, text[0].place) for text in texts)

    def require_usable(self, record: Record) -> None:
        try:
            self._read(record)
        except ImageError as error:
            raise needed_by(error, record.place) from None

    def _read(self, record: Record) -> ProcessorSample:
        """Return a sample that the processor takes, and that has an answer within `max_length`."""
        sample = self._checked(self._with_images((record, self._rendered(record))))
        if self.max_length is None:
            return sample
        batch = self._batch([sample])
        if int(batch["attention_mask"].sum()) <= self.max_length:
            return sample
        return self._cut(_rows(batch, [sample])[0], self.max_length)

    def _with_images(self, text: tuple[Record, Rendered]) -> ProcessorSample:
        record, rendered = text[0].within(self.image_folder), text[1]
        images = tuple(map(load_image, record.images))
        return ProcessorSample(record, rendered, images, tuple(self._frames(record, video) for video in record.videos))

    def num_frames(self, record: Record) -> list[int]:
        return list(map(self.inputs.num_frames, record.within(self.image_folder).videos))

    def _frames(self, record: Record, video: Video) -> Frames:
        try:
            return self.inputs.frames(video)
        except ImageError:
            raise
        except DataError as error:
            raise with_context(error, record.place) from None

    def _collated(self, records: Sequence[RecordLike | Sequence[RecordLike]]) -> dict[str, Any]:
        if not any(isinstance(item, Sequence) for item in records):
            batch, samples = self._padded(self._samples(records))  # type: ignore[arg-type]
            return self._shown(batch, samples)
        packer = self._packer  # raises for a model that cannot, before pictures are read
        packs = [item if isinstance(item, Sequence) else [item] for item in records]
        samples = [replace(sample, row=row) for row, pack in enumerate(packs) for sample in self._samples(pack)]
        batch, samples = self._padded(samples)
        rows = [sample.row for sample in samples]
        pad_id, multiple = pad_id_of(self.inputs.tokenizer), self.pad_to_multiple_of
        return self._shown(packer(batch, rows, pad_id=pad_id, multiple=multiple), samples)

    def _shown(self, batch: dict[str, Any], samples: Sequence[ProcessorSample]) -> dict[str, Any]:
        """Return the batch; if no sample has a picture or a video, with a hidden one, where that is needed.

        The vision tower runs once for pictures and once for videos: where the data has both, each batch gets both.
        """
        lacks = [not any(sample.images for sample in samples), not any(sample.videos for sample in samples)]
        if not (self.always_shows_videos and self.inputs.takes_videos_apart):
            lacks = [all(lacks), False]
        if not self.always_shows_images or not any(lacks):
            return batch
        if self.inputs.by_cross_attention:
            return with_unseen_pictures(batch, self.inputs.plain_picture, ())
        pad_id, kind, beside = pad_id_of(self.inputs.tokenizer), getattr(self.model_config, "model_type", None), 0
        hidden = [self.inputs.plain_picture] if lacks[0] else []
        for plain in [*hidden, self.inputs.hidden_video] if lacks[1] else hidden:
            batch = with_hidden_picture(batch, plain, pad_id, self.pad_to_multiple_of, kind, beside)
            beside += plain["input_ids"].shape[1]
        return batch

    @cached_property
    def _packer(self) -> RowPacker:
        if self.model_config is None:
            message = "model_config is missing: the records of a row need positions, which depend on the model"
            hint = "use  milora_vl.collator_for(model, processor)"
            raise UserError(message, code="collate-unsupported-layout", hint=hint)
        return RowPacker(self.model_config, self.packing)

    def _padded(self, samples: list[ProcessorSample]) -> tuple[dict[str, Any], list[ProcessorSample]]:
        """Return the batch of the samples, one row each, and the samples that are in it."""
        for spare in range(_NUM_CUTS):  # a shortened text may have one token more than the cut counted
            samples = samples or [self._substitute()]
            batch, samples = self._processed(samples)
            rows = _rows(batch, samples)
            if self.max_length is None or batch["input_ids"].shape[1] <= self.max_length:
                break
            lengths = batch["attention_mask"].sum(1).tolist()
            if max(lengths) <= self.max_length:  # pad_to_multiple_of may exceed it
                break
            cut = partial(self._cut, limit=self.max_length - spare)
            samples = _present(
                self._kept(cut, row, row.sample.where) if length > self.max_length else row.sample
                for row, length in zip(rows, lengths, strict=True)
            )
        else:
            where = rows[lengths.index(max(lengths))].sample.where
            message = f"this record has {max(lengths)} tokens after {_NUM_CUTS} cuts to max_length {self.max_length}"
            raise DataError(message, where=where, hint="shorten the record, or raise --max_length")
        self._last_sample = samples[-1]
        for sample in samples:
            if sample.is_cut:
                self._count("cut")
        # A processor that takes the answer apart labels it itself.
        labels = batch["labels"] if rows[0].sample.rendered.suffix is not None else _labels(batch, rows)
        first = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        others = {name: value for name, value in batch.items() if name not in (*first, *_NOT_FOR_THE_MODEL)}
        return first | others, samples

    def _processed(self, samples: list[ProcessorSample]) -> tuple[dict[str, Any], list[ProcessorSample]]:
        """Return the processor's output for the samples, and the samples without those that it refuses."""
        while True:
            try:
                return self._batch(samples), samples
            except DataError as error:  # the records are of kinds that do not fit into one batch
                first = {(bool(sample.images), len(sample.videos)): sample.where for sample in reversed(samples)}
                where = " and ".join(dict.fromkeys(reversed(first.values())))
                raise with_problems(error, [replace(error.first, where=where, hint=BATCH_OF_ONE)]) from None
            except UserError:
                raise
            except PROCESSOR_ERRORS as error:
                usable = _present(self._kept(self._checked, sample, sample.where) for sample in samples)
                if usable == samples:
                    message = f"the processor refuses these records in one batch: {first_line(error)}"
                    where, code = samples[0].where, "record-processor-refuses"
                    raise DataError(message, code=code, where=where, hint=BATCH_OF_ONE) from None
                samples = usable or [self._substitute()]

    def _batch(self, samples: Sequence[ProcessorSample]) -> dict[str, Any]:
        return self.inputs(
            [sample.rendered for sample in samples],
            [sample.images for sample in samples],
            [sample.videos for sample in samples],
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            with_spans=True,
        )

    def _checked(self, sample: ProcessorSample) -> ProcessorSample:
        """Return a sample that the processor takes alone. Raises `DataError` for another, and for its picture."""
        try:
            self._batch([sample])
            return sample
        except UserError:
            raise
        except PROCESSOR_ERRORS as error:
            for image, picture in zip(sample.images, sample.record.images, strict=True):
                self._require_taken(image, picture)
            message = f"the processor refuses this record: {first_line(error)}"
            raise DataError(message, code="record-processor-refuses", where=sample.where) from None

    def _require_taken(self, image: Any, picture: Picture) -> None:
        try:
            self.inputs.processor.image_processor(images=[image], return_tensors="pt")
        except PROCESSOR_ERRORS as error:
            reason = f"{image.width} x {image.height} pixels: {first_line(error)}"
            hint = "save it again as RGB, in a usual size and aspect ratio"
            message = f"the processor refuses this picture: {reason}"
            raise ImageError(message, reason, where=str(picture), hint=hint) from None

    def _cut(self, row: _ExpandedRow, limit: int) -> ProcessorSample:
        """Return the sample of a row with at most `limit` tokens. Raises `NoSupervisedTokens` if no answer is left."""
        sample, rendered = row.sample, row.sample.rendered
        message = f"this record has no supervised answer: max_length {self.max_length} cuts off all of them"
        error = NoSupervisedTokens(message, code="record-no-answer", where=sample.where)
        if rendered.suffix is not None:  # question and answer are one example
            raise error
        end = row.source(int(row.offsets[limit - 1, 1]))
        ranges = tuple((start, min(stop, end)) for start, stop in rendered.supervised if start < end)
        if not ranges:
            raise error
        text = rendered.text[:end]
        images = sample.images[: self.inputs.num_placeholders(text)]
        videos = sample.videos[: self.inputs.num_videos(text)]
        return replace(sample, rendered=Rendered(text, ranges), images=images, videos=videos, is_cut=True)


@dataclass(frozen=True, slots=True)
class _ExpandedRow:
    """One row of a batch: its sample, the characters of each token (length, 2) in the expanded text, and its pictures.

    `spans` has two ranges of characters for each picture: its placeholder, and the text that replaces it.
    """

    sample: ProcessorSample
    offsets: np.ndarray
    spans: tuple[tuple[int, int, int, int], ...]

    def expanded(self, index: int) -> int:
        """Return the index in the expanded text of an index in the sample's text, which is outside of placeholders."""
        return index + sum((stop - start) - (end - begin) for begin, end, start, stop in self.spans if end <= index)

    def source(self, index: int) -> int:
        """Return the index in the sample's text of an index in the expanded text; within a picture, its start."""
        moved = 0
        for begin, end, start, stop in self.spans:
            if index < stop:
                return begin if index > start else index - moved
            moved += (stop - start) - (end - begin)
        return index - moved

    def supervised(self) -> Iterator[tuple[int, int]]:
        """Yield the supervised ranges of the expanded text (start, end), without pictures."""
        for start, stop in self.sample.rendered.supervised:
            at, end = self.expanded(start), self.expanded(stop)
            for _, _, begin, close in self.spans:
                if at <= begin < end:
                    yield at, begin
                    at = close
            yield at, end


def _rows(batch: Mapping[str, Any], samples: Sequence[ProcessorSample]) -> list[_ExpandedRow]:
    rows = zip(samples, batch["offset_mapping"].numpy(), batch[SPANS], strict=True)
    return [_ExpandedRow(sample, offsets, tuple(spans)) for sample, offsets, spans in rows]


def _labels(batch: Mapping[str, Any], rows: Sequence[_ExpandedRow]) -> torch.Tensor:
    """Return the labels (batch, length): the ids of supervised tokens, -100 elsewhere."""
    offsets = batch["offset_mapping"].numpy()
    ends = offsets[:, :, 1]
    # Some tokenizers leave blanks out of the offsets: a token begins at the latest where the one before it ends.
    starts = offsets[:, :, 0].copy()
    np.minimum(starts[:, 1:], np.maximum.accumulate(ends, axis=1)[:, :-1], out=starts[:, 1:])
    starts[:, 0] = 0
    supervised = np.zeros(ends.shape, dtype=bool)
    for row, flags, first, last in zip(rows, supervised, starts, ends, strict=True):
        for start, stop in row.supervised():
            flags |= (first < stop) & (last > start)
    supervised &= starts < ends  # not a token without characters
    return batch["input_ids"].where(torch.from_numpy(supervised) & batch["attention_mask"].bool(), IGNORE)


def _present(samples: Iterable[ProcessorSample | None]) -> list[ProcessorSample]:
    return [sample for sample in samples if sample is not None]


def labelled_inputs(
    inputs: ProcessorInputs, rendered: Rendered, images: Sequence[Any], videos: Sequence[Frames] = ()
) -> dict[str, Any]:
    """Return the model's inputs for one text with its pictures and videos, and its labels, as in a batch."""
    sample = ProcessorSample(Record("", (), ()), rendered, tuple(images), tuple(videos))
    batch = inputs([rendered], [images], [videos], padding_side="right", with_spans=True)
    labels = batch["labels"] if rendered.suffix is not None else _labels(batch, _rows(batch, [sample]))
    return {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL} | {"labels": labels}


def with_video_marks(turns: Sequence[Turn], num_images: int, num_videos: int) -> list[Turn]:
    """Return the turns with a mark for each `<video>`, if the record has videos.

    Raises `DataError` if `<image>` or `<video>` are not as many as pictures or videos, or if a text
    has such a mark already.
    """
    text = "\n".join(turn.text for turn in turns)
    require_no_boxes([text])
    if VIDEO_MARK in text:
        message, hint = f"a text contains {VIDEO_MARK!r}, the mark of a video", "remove these characters"
        raise DataError(message, code="record-image-token-in-text", hint=hint)
    for marker, what, number in ((IMAGE, "picture", num_images), (VIDEO, "video", num_videos)):
        found = text.count(marker)
        if found != number and (number or marker == IMAGE):
            message = f"{found} {marker} in the conversation, but {amount(number, what)} in the record"
            raise DataError(message, code="record-image-count", hint=f"write {marker} once for each {what}")
    return [replace(turn, text=turn.text.replace(VIDEO, VIDEO_MARK)) for turn in turns] if num_videos else list(turns)
