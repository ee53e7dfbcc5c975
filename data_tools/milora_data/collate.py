"""Records to a batch for any HF LLaVA model: encoded, right-padded, with the pixels of their pictures.

A batch without any picture gets a plain one, whose tokens are hidden from attention and from the loss: tower and
projector stay in the graph with gradient zero, as DDP and ZeRO-3 need it (LLaVA splices features of length zero).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .encode import IGNORE, Encoded, NothingToLearn, encode
from .errors import DataError, UserError
from .images import ImageError, ImagePolicy
from .pixels import AspectRatio, JpegDecoding, PixelMaker
from .records import Record, parse_record
from .templates import IMAGE

log = logging.getLogger(__name__)

_MAX_WORKERS = 256
_COUNTERS = ("skipped", "replaced", "unlearnable", "cut")


class Sample(NamedTuple):
    """One encoded record and its pictures, as PIL images."""

    encoded: Encoded
    images: list[Any]


class ImageTextCollator:
    """Turns records (`Record` or LLaVA dicts) into a batch; usable as `data_collator`, with workers too.

    `__call__` returns input_ids, attention_mask, labels (batch, length) and, with an image processor, pixel_values
    (num_images, 3, H, W): the pictures of all records in order. Labels are -100 wherever nothing is learnt.
    `image_token_id` is the tokenizer's `<image>` unless given; `image_folder` None takes picture names as they are.

    `bad_images` says what happens with a picture that cannot be read: `raise`, `skip` its record, or `replace` it by a
    plain one. A record with nothing to learn is left out. Each case is logged, and counted in `counts()`.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any = None,
        *,
        template: str = "vicuna_v1",
        image_tokens: int = 576,
        image_token_id: int | None = None,
        image_folder: str | Path | None = None,
        max_length: int | None = None,
        image_aspect_ratio: AspectRatio = "pad",
        bad_images: ImagePolicy = "raise",
        jpeg_decoding: JpegDecoding = "exact",
        pad_to_multiple_of: int = 1,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_aspect_ratio: AspectRatio = image_aspect_ratio
        self.jpeg_decoding: JpegDecoding = jpeg_decoding
        self._maker: PixelMaker | None = None
        self.template = template
        self.image_tokens = image_tokens
        self.image_token_id = self._own_image_token() if image_token_id is None else image_token_id
        self.image_folder = Path(image_folder or "")
        self.max_length = max_length
        self.bad_images = bad_images
        self.pad_to_multiple_of = pad_to_multiple_of
        # One row per loader process, in shared memory: the process that reports is not the one that counts.
        self._counts = torch.zeros(_MAX_WORKERS, len(_COUNTERS), dtype=torch.long).share_memory_()
        self._spare: Sample | None = None

    def __call__(self, records: Sequence[Record | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of `records`; raises `DataError` with file and line."""
        samples = [sample for record in records if (sample := self._sample(record)) is not None]
        if not samples:
            samples = [self._substitute()]
        self._spare = samples[-1]
        return self._batch(samples)

    def counts(self) -> dict[str, int]:
        """Return how many records were skipped, unlearnable or cut, and pictures replaced, in all loader processes."""
        return dict(zip(_COUNTERS, self._counts.sum(0).tolist(), strict=True))

    def _own_image_token(self) -> int:
        if self.image_processor is None:
            return -1
        found = self.tokenizer.convert_tokens_to_ids(IMAGE)
        if found is None or found == self.tokenizer.unk_token_id:
            raise UserError(
                f"this tokenizer has no {IMAGE} token\nname the one of the model's config: image_token_id=..."
            )
        return int(found)

    def _sample(self, record: Record | Mapping[str, Any]) -> Sample | None:
        record = record if isinstance(record, Record) else parse_record(record)
        try:
            encoded = encode(
                record,
                self.tokenizer,
                template=self.template,
                image_token_id=self.image_token_id,
                image_tokens=self.image_tokens,
                max_length=self.max_length,
            )
            images = self._images(record, encoded.num_images)
        except NothingToLearn as error:
            self._leave_out("unlearnable", error)
            return None
        except ImageError as error:
            if self.bad_images == "raise":
                place = record.source or record.id
                raise ImageError(f"{error}\nneeded by {place}; --bad_images skip leaves it out") from None
            self._leave_out("skipped", error)
            return None
        if encoded.num_cut:
            self._count("cut")
        return Sample(encoded, images)

    def _images(self, record: Record, num_images: int) -> list[Any]:
        if num_images and self.image_processor is None:
            raise DataError(f"{record.source or record.id}: a record with pictures, but this model reads only text")
        # max_length may have cut off the last ones.
        return [self._image(self.image_folder / name) for name in record.images[:num_images]]

    def _image(self, path: Path) -> Any:
        try:
            return self._pixels().read(path)
        except ImageError as error:
            if self.bad_images != "replace":
                raise
            self._count("replaced")
            log.warning("%s (a plain picture takes its place)", error)
            return self._pixels().plain_image()

    def _pixels(self) -> PixelMaker:
        if self._maker is None or self._maker.image_processor is not self.image_processor:
            self._maker = PixelMaker(self.image_processor, self.image_aspect_ratio, self.jpeg_decoding)
        return self._maker

    def _leave_out(self, counter: str, error: DataError) -> None:
        self._count(counter)
        log.warning("left out: %s", error)

    def _substitute(self) -> Sample:
        # A step must have a batch: the last good record of this process stands in, which is counted above and logged.
        if self._spare is None:
            raise DataError("every record of the first batch was left out; see the warnings above")
        return self._spare

    def _count(self, counter: str) -> None:
        worker = get_worker_info()
        self._counts[worker.id % (_MAX_WORKERS - 1) + 1 if worker else 0, _COUNTERS.index(counter)] += 1

    def _batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        images = [image for sample in samples for image in sample.images]
        rows = [(sample.encoded.input_ids, sample.encoded.labels) for sample in samples]
        lengths = [len(ids) for ids, _ in rows]
        if self.image_processor is not None and not images:
            self._add_hidden_image(rows, lengths)
            images = [self._pixels().plain_image()]
        batch = self._pad(rows, lengths)
        if images:
            batch["pixel_values"] = self._pixels()(images)
            num_tokens = int((batch["input_ids"] == self.image_token_id).sum())
            assert num_tokens == len(batch["pixel_values"]) * self.image_tokens
        return batch

    def _add_hidden_image(self, rows: list[tuple[list[int], list[int]]], lengths: Sequence[int]) -> None:
        # Behind the shortest row, beyond its attended length, so that the batch grows as little as it can.
        shortest = min(range(len(rows)), key=lambda row: lengths[row])
        ids, labels = rows[shortest]
        rows[shortest] = (ids + [self.image_token_id] * self.image_tokens, labels + [IGNORE] * self.image_tokens)

    def _pad(self, rows: Sequence[tuple[list[int], list[int]]], lengths: Sequence[int]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        pad_id = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), width), pad_id)
        labels = torch.full((len(rows), width), IGNORE)
        attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
        for row, ((ids, targets), length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(targets)
            attention_mask[row, :length] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
