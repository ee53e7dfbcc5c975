"""Records to a batch for HF's LLaVA models or LLaVA's own: encoded, padded or packed, with their pixels.

A batch without any picture gets a plain one, whose tokens are hidden from attention and from the loss: tower and
projector stay in the graph with gradient zero, as DDP and ZeRO-3 need it (LLaVA splices features of length zero).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import get_worker_info

from milora_data.anyres import Tiling
from milora_data.batches import Row, joined, packed, padded, with_single_image_tokens
from milora_data.encode import IGNORE, Encoded, NothingToLearn, encode
from milora_data.errors import DataError, UserError
from milora_data.features import FeatureReader
from milora_data.images import ImageError, ImagePolicy, place_of
from milora_data.pixels import AspectRatio, JpegDecoding, PixelMaker
from milora_data.records import Record, parse_record
from milora_data.templates import IMAGE, get_template

log = logging.getLogger(__name__)

LLAVA_IMAGE_ID = -200
_MAX_WORKERS = 256
_COUNTERS = ("skipped", "replaced", "unlearnable", "cut", "broken")


Item = Record | Mapping[str, Any] | DataError


class Sample(NamedTuple):
    """One encoded record and its pictures, as PIL images."""

    encoded: Encoded
    images: list[Any]


class ImageTextCollator:
    """Turns records (`Record` or LLaVA dicts) into a batch; usable as `data_collator`, with workers too.

    `__call__` returns input_ids, attention_mask, labels (batch, length) and, with an image processor, pixel_values
    (num_images, 3, H, W): the pictures of all records in order. Labels are -100 wherever nothing is learnt.
    A list of records in place of one is packed into one row (pack.py): position_ids and use_cache then stand for
    attention_mask, and `packing="flat"` makes one row of all, as flash attention needs it.
    With `tiling` (anyres.py), of LLaVA-1.6, pictures are cut into tiles: each has as many tokens as its size asks for,
    and the batch has image_sizes too; `image_tokens` and `image_aspect_ratio` are then without meaning.
    `image_token_id` is the tokenizer's `<image>` unless given; `image_folder` None takes picture names as they are.
    `layout="llava"` is for LLaVA's own classes: one -200 for each picture, and `images`, a plain one for text alone.

    `bad_images` says what happens with a picture that cannot be read: `raise`, `skip` its record, or `replace` it by a
    plain one. A record with nothing to learn is left out; so is a broken one (a stream gives a `DataError` in its
    place), unless `raise` is said. Each case is logged, and counted in `counts()`. Of
    `substitutes`, the first good one stands in for a batch of which nothing is left (else the last good record does).
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
        layout: Literal["hf", "llava"] = "hf",
        packing: Literal["rows", "flat"] = "rows",
        substitutes: Sequence[Item] = (),
        tiling: Tiling | None = None,
    ) -> None:
        if tiling is not None and layout == "llava":
            raise UserError("pictures in tiles (anyres) are for Hugging Face's LLaVA-1.6, not for LLaVA's own classes")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.tiling = tiling
        self.features: FeatureReader | None = None  # what the tower makes of pictures, in place of their pixels
        self.image_aspect_ratio: AspectRatio = "anyres" if tiling else image_aspect_ratio
        self.jpeg_decoding: JpegDecoding = jpeg_decoding
        self._maker: PixelMaker | None = None
        get_template(template)
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length must be at least 1, got {max_length}")
        self.template = template
        self.image_tokens = image_tokens
        self.image_token_id = self._own_image_token() if image_token_id is None else image_token_id
        self.image_folder = Path(image_folder or "")
        self.max_length = max_length
        self.bad_images = bad_images
        self.pad_to_multiple_of = pad_to_multiple_of
        self.layout = layout
        self.packing = packing
        self._untried = list(reversed(substitutes))
        self._spare_given: Sample | None = None
        # One row per loader process, in shared memory: the process that reports is not the one that counts.
        self._counts = torch.zeros(_MAX_WORKERS, len(_COUNTERS), dtype=torch.long).share_memory_()
        self._spare: Sample | None = None

    def __call__(self, records: Sequence[Item | Sequence[Item]]) -> dict[str, Any]:
        """Return the batch of `records`; raises `DataError` with file and line."""
        packs = [[item] if isinstance(item, Record | Mapping | DataError) else list(item) for item in records]
        is_packed = any(not isinstance(item, Record | Mapping | DataError) for item in records)
        if is_packed and self.layout == "llava":
            raise UserError("LLaVA's own classes make their positions themselves: they cannot take packed records")
        read = [[sample for item in pack if (sample := self._sample(item)) is not None] for pack in packs]
        rows = [samples for samples in read if samples] or [[self._substitute()]]
        self._spare = rows[-1][-1]
        return self._batch(rows, is_packed)

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

    def _sample(self, item: Item) -> Sample | None:
        try:
            record = _record(item)
            sample = self._read(record)
        except NothingToLearn as error:
            self._leave_out("unlearnable", error)
            return None
        except ImageError as error:
            if self.bad_images == "raise":
                raise ImageError(
                    f"{error}\nneeded by {record.source or record.id}; --bad_images skip leaves it out"
                ) from None
            self._leave_out("skipped", error)
            return None
        except DataError as error:
            if self.bad_images == "raise":
                raise
            self._leave_out("broken", error)
            return None
        if sample.encoded.num_cut:
            self._count("cut")
        return sample

    def _read(self, record: Record) -> Sample:
        if self.tiling is None:
            encoded = self._encoded(record, [self.image_tokens] * len(record.images))
            return Sample(encoded, self._images(record, encoded.num_images))
        images = self._images(record, len(record.images))
        encoded = self._encoded(record, [self._num_tokens(image) for image in images])
        return Sample(encoded, images[: encoded.num_images])

    def _num_tokens(self, image: Any) -> int:
        return self.image_tokens if self.tiling is None else self.tiling.num_tokens(image.height, image.width)

    def _encoded(self, record: Record, counts: list[int]) -> Encoded:
        encoded = encode(
            record,
            self.tokenizer,
            template=self.template,
            image_token_id=self.image_token_id,
            image_tokens=counts,
            max_length=self.max_length,
        )
        found, expected = encoded.input_ids.count(self.image_token_id), sum(counts[: encoded.num_images])
        if found != expected:
            raise DataError(
                f"{record.source or record.id}: {found} tokens of pictures for {encoded.num_images} pictures "
                f"of {expected} in all: the text itself holds the picture token ({self.image_token_id})"
            )
        return encoded

    def _images(self, record: Record, num_images: int) -> list[Any]:
        if num_images and self.image_processor is None:
            raise DataError(f"{record.source or record.id}: a record with pictures, but this model reads only text")
        # max_length may have cut off the last ones.
        return [self._image(place_of(self.image_folder, name)) for name in record.images[:num_images]]

    def _image(self, path: str | Path) -> Any:
        try:
            return self._pixels().read(path)
        except ImageError as error:
            if self.bad_images != "replace":
                raise
            self._count("replaced")
            log.warning("%s (a plain picture takes its place)", error)
            return self._pixels().plain_image()

    def _pixels(self) -> PixelMaker | FeatureReader:
        return self.features or self.maker()

    def maker(self) -> PixelMaker:
        """Return what makes pixels of picture files for this image processor."""
        if self._maker is None or self._maker.image_processor is not self.image_processor:
            self._maker = PixelMaker(self.image_processor, self.image_aspect_ratio, self.jpeg_decoding)
        return self._maker

    def _leave_out(self, counter: str, error: DataError) -> None:
        self._count(counter)
        log.warning("left out: %s", error)

    def _substitute(self) -> Sample:
        # A step must have a batch. Given records come first: with them, a resumed run does what an unbroken one does.
        while self._spare_given is None and self._untried:
            record = self._untried.pop()
            try:
                self._spare_given = self._read(_record(record))
            except DataError:
                continue  # it is reported where it comes up itself
        found = self._spare_given or self._spare
        if found is None:
            raise DataError("every record of the first batch was left out; see the warnings above")
        return found

    def _count(self, counter: str) -> None:
        worker = get_worker_info()
        self._counts[worker.id % (_MAX_WORKERS - 1) + 1 if worker else 0, _COUNTERS.index(counter)] += 1

    def _batch(self, samples: Sequence[Sequence[Sample]], is_packed: bool) -> dict[str, Any]:
        images = [image for row in samples for sample in row for image in sample.images]
        rows = [joined([_row(sample) for sample in row]) if is_packed else _row(row[0]) for row in samples]
        if is_packed and self.packing == "flat":
            rows = [joined(rows)]
        if self.layout == "llava":
            return self._llava_batch(rows, [row[0].images for row in samples])
        if self.image_processor is not None and not images:
            images = [self._pixels().plain_image()]
            rows = self._with_hidden_image(rows, self._num_tokens(images[0]))
        batch = (packed if is_packed else padded)(rows, self._pad_id(), self.pad_to_multiple_of)
        if images:
            batch |= self._pixels().inputs(images)
            num_tokens = int((batch["input_ids"] == self.image_token_id).sum())
            assert num_tokens == sum(map(self._num_tokens, images))
        return batch

    def _with_hidden_image(self, rows: Sequence[Row], num_tokens: int) -> list[Row]:
        # Behind the shortest row, beyond its attended length, so that the batch grows as little as it can.
        shortest = min(range(len(rows)), key=lambda row: len(rows[row].input_ids))
        hidden = [self.image_token_id] * num_tokens, [IGNORE] * num_tokens
        return [
            Row(row.input_ids + hidden[0], row.labels + hidden[1], row.lengths) if number == shortest else row
            for number, row in enumerate(rows)
        ]

    def _llava_batch(self, rows: Sequence[Row], images: Sequence[list[Any]]) -> dict[str, Any]:
        own = (self.image_token_id, self.image_tokens, LLAVA_IMAGE_ID)
        batch = padded([with_single_image_tokens(row, *own) for row in rows], self._pad_id(), self.pad_to_multiple_of)
        batch["attention_mask"] = batch["attention_mask"].bool()
        if self.image_processor is not None:
            # LLaVA takes a picture for every row, and none of the features of those that have no place for it.
            pictures = [image for row in images for image in (row or [self._pixels().plain_image()])]
            batch["images"] = self._pixels().inputs(pictures)["pixel_values"]
        return batch

    def _pad_id(self) -> int:
        own = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if own is None else own)


def _record(item: Item) -> Record:
    """Return an item as a `Record`. Raises `DataError`, also the one that stands in the place of a broken record."""
    if isinstance(item, DataError):
        raise item
    return item if isinstance(item, Record) else parse_record(item)


def _row(sample: Sample) -> Row:
    encoded = sample.encoded
    return Row(encoded.input_ids, encoded.labels, [len(encoded.input_ids)])
