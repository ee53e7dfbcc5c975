"""Collate records into a batch for HF's LLaVA models or LLaVA's own: encode, pad or pack, add pixel values.

A batch without pictures gets one plain picture, whose tokens are hidden from attention and from the loss. Vision tower
and projector then stay in the graph with gradient zero, which DDP and ZeRO-3 require: all ranks must use the same
parameters in each step. (LLaVA splices features of length zero for the same reason.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from milora_data.batches.pack import Row, joined, packed, packed_flat, padded
from milora_data.batches.record_collator import RecordCollator, RecordLike, pad_id_of
from milora_data.encode.chat_template_mask import require_template
from milora_data.encode.labels import IGNORE, Encoded, encode, record_segments
from milora_data.encode.templates import OWN, Segment, template_name
from milora_data.encode.tokens import fast_backend, own_template
from milora_data.pictures.load import ImagePolicy, Picture
from milora_data.pictures.pixels import AspectRatio, PixelMaker, Tiling
from milora_data.records.boxes import Boxes
from milora_data.records.record import IMAGE, Record
from milora_vl.common.errors import DataError, UserError, with_context

log = logging.getLogger(__name__)

LLAVA_IMAGE_ID = -200
USE_COLLATOR_FOR = "use  milora_vl.collator_for(model, processor)"
LLAVA_SIDE, LLAVA_TOKENS = 336, 576  # of a picture in LLaVA-1.5


class ImageTextCollator(RecordCollator[Row]):
    """Collates records (`Record` or LLaVA dicts) into a batch; usable as `data_collator`, also in loader processes.

    `__call__` returns input_ids, attention_mask, labels (batch, length) and, with an image processor, pixel_values
    (num_images, 3, H, W): the pictures of all records in order. Labels of unsupervised tokens are -100.

    A list of records in place of a record is packed into one row (`PackedRecords`). The batch then has position_ids and
    use_cache in place of attention_mask; `packing="flat"` joins all rows into one, which flash attention needs, and for
    text models adds cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k.
    `tiling` (pixels.py) cuts pictures into tiles as LLaVA-1.6 does: the number of tokens depends on the size of the
    picture, the batch also has image_sizes, and `image_tokens` and `image_aspect_ratio` are ignored.
    `image_tokens` defaults to the 576 of LLaVA-1.5, and `image_token_id` to the tokenizer's `<image>`. With
    `image_folder` None, picture names are used as paths.

    `RecordCollator` explains `bad_images` and `substitutes`.

    >>> from milora_vl.models.tiny import tiny_tokenizer
    >>> turns = [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "Yes."}]
    >>> batch = ImageTextCollator(tiny_tokenizer())([{"conversations": turns}, {"conversations": turns + turns}])
    >>> {name: tuple(tensor.shape) == tuple(batch["labels"].shape) for name, tensor in batch.items()}
    {'input_ids': True, 'attention_mask': True, 'labels': True}
    >>> batch["attention_mask"].sum(dim=1).diff().item() > 0  # the first record is shorter, and padded on the right
    True
    """

    is_causal = True
    always_shows_images = True

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any = None,
        *,
        template: str = "vicuna_v1",
        image_tokens: int | None = None,
        image_token_id: int | None = None,
        image_folder: str | Path | None = None,
        max_length: int | None = None,
        image_aspect_ratio: AspectRatio = "pad",
        bad_images: ImagePolicy = "raise",
        pad_to_multiple_of: int = 1,
        packing: Literal["rows", "flat"] = "rows",
        substitutes: Sequence[RecordLike] = (),
        tiling: Tiling | None = None,
    ) -> None:
        if "image_processor" in dir(tokenizer):
            message, hint = f"expected a tokenizer, got a {type(tokenizer).__name__}", USE_COLLATOR_FOR
            raise UserError(message, code="collate-no-tokenizer", where="tokenizer", hint=hint)
        super().__init__(bad_images, substitutes, image_folder=image_folder, max_length=max_length)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.tiling = tiling
        self.image_aspect_ratio: AspectRatio = "anyres" if tiling else image_aspect_ratio
        self.boxes = Boxes(f"LLaVA ({self.image_aspect_ratio})")
        self._maker: PixelMaker | None = None
        require_template(template, tokenizer)
        self.template = template
        self.image_token_id = self._own_image_token() if image_token_id is None else image_token_id
        self.image_tokens = self._usual_tokens() if image_tokens is None else image_tokens
        self.pad_to_multiple_of = pad_to_multiple_of
        self.packing = packing

    def full_length(self, record: Record) -> int:
        text = self._text(record)
        return len(text.input_ids) + sum(self._counts_by_size(record)[: text.num_images])

    def num_supervised(self, record: Record) -> int:
        text = self._text(record)
        return len(text.labels) - text.labels.count(IGNORE)

    def _text(self, record: Record) -> Encoded:
        """Return a record without the tokens of its pictures."""
        record = self._with_boxes(record)
        return encode(record, self.tokenizer, template=self.template, image_token_id=-1, image_tokens=0)

    def segments(self, record: Record) -> list[Segment]:
        record = self._with_boxes(record)
        try:
            return record_segments(record, self.tokenizer, self.template)[1]
        except DataError as error:
            raise with_context(error, record.place) from None

    def require_usable(self, record: Record) -> None:
        self._encoded(record, self._counts_by_size(record))

    def length_settings(self) -> str:
        own = own_template(self.tokenizer) if template_name(self.template) == OWN else ""
        images = self.tiling or self.image_tokens
        backend = fast_backend(self.tokenizer).to_str()
        return f"{images}\0{own}{self.template}\0{backend}\0{self.tokenizer.eos_token}"

    @property
    def length_by_size(self) -> bool:  # type: ignore[override]
        return self.tiling is not None

    def _counts_by_size(self, record: Record) -> list[int]:
        """Return the number of tokens of each image of a record."""
        if self.tiling is None:
            return [self.image_tokens] * len(record.images)
        return [self.tiling.num_tokens(*self._size(picture)) for picture in record.images]

    def _usual_tokens(self) -> int:
        """Return the tokens of a picture in LLaVA-1.5. Raises UserError if the pictures have another size there."""
        if self.image_processor is not None and self.tiling is None and self.maker().side != LLAVA_SIDE:
            message = f"pictures of {self.maker().side} pixels do not take LLaVA-1.5's {LLAVA_TOKENS} tokens"
            raise UserError(message, code="collate-image-tokens", where="image_tokens", hint=USE_COLLATOR_FOR)
        return LLAVA_TOKENS

    def _collated(self, records: Sequence[RecordLike | Sequence[RecordLike]]) -> dict[str, Any]:
        packs = [[item] if isinstance(item, Record | Mapping | UserError) else list(item) for item in records]
        is_packed = any(not isinstance(item, Record | Mapping | UserError) for item in records)
        kept = [[row for item in pack if (row := self._sample(item)) is not None] for pack in packs]
        rows = [rows for rows in kept if rows] or [[self._substitute()]]
        self._last_sample = rows[-1][-1]
        return self._batch([joined(pack) if is_packed else pack[0] for pack in rows], is_packed)

    def _own_image_token(self) -> int:
        if self.image_processor is None:
            return -1
        token_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            hint = "pass the id from the model's config: image_token_id=..."
            raise UserError(f"this tokenizer has no {IMAGE} token", hint=hint)
        return int(token_id)

    def _read(self, record: Record) -> Row:
        if self.tiling is None:
            encoded = self._encoded(record, [self.image_tokens] * len(record.images))
            images = self._images(record, encoded.num_images)
        else:  # the size of a picture decides how many tokens it takes: read the pictures before encoding
            images = self._images(record, len(record.images))
            encoded = self._encoded(record, [self._num_tokens(image) for image in images])
        if encoded.num_cut:
            self._count("cut")
        return Row(encoded.input_ids, encoded.labels, [len(encoded.input_ids)], images[: encoded.num_images])

    def _num_tokens(self, image: Any) -> int:
        return self.image_tokens if self.tiling is None else self.tiling.num_tokens(image.height, image.width)

    def _encoded(self, record: Record, counts: list[int]) -> Encoded:
        encoded = encode(
            self._with_boxes(record),
            self.tokenizer,
            template=self.template,
            image_token_id=self.image_token_id,
            image_tokens=counts,
            max_length=self.max_length,
        )
        if self.image_token_id < 0:
            self._require_no_pictures(record, encoded.num_images)
        # A text may contain the picture token itself. The model would then replace text by features of a picture.
        actual, expected = encoded.input_ids.count(self.image_token_id), sum(counts[: encoded.num_images])
        if actual != expected:
            message = (
                f"a text contains the picture token ({self.image_token_id}): {actual} of them, expected {expected}"
            )
            hint = "remove the token from the text"
            raise DataError(message, code="record-image-token-in-text", where=record.place, hint=hint)
        return encoded

    def _images(self, record: Record, num_images: int) -> list[Any]:
        if self.image_processor is None:
            self._require_no_pictures(record, num_images)
        # max_length may have cut off the last pictures: do not read them.
        return list(map(self._image, record.images[:num_images]))

    @staticmethod
    def _require_no_pictures(record: Record, num_images: int) -> None:
        if num_images:
            message = "a record with pictures, but this model reads only text"
            hint = "train a vision-language model, or remove the pictures and <image> from the records"
            raise DataError(message, code="model-reads-only-text", where=record.place, hint=hint)

    def _image(self, picture: Picture) -> Any:
        return self.maker().read(picture.within(self.image_folder))

    def maker(self) -> PixelMaker:
        if self._maker is None or self._maker.image_processor is not self.image_processor:
            self._maker = PixelMaker(self.image_processor, self.image_aspect_ratio)
        return self._maker

    def _batch(self, rows: list[Row], is_packed: bool) -> dict[str, Any]:
        is_flat = is_packed and self.packing == "flat"
        if is_flat:
            rows = [joined(rows)]
        images = [image for row in rows for image in row.images]
        if self.image_processor is not None and not images:
            # Keep tower and projector in the graph (see the module's docstring).
            images = [self.maker().plain_image()]
            rows = self._with_hidden_image(rows, self._num_tokens(images[0]))
        pad_id, multiple = pad_id_of(self.tokenizer), self.pad_to_multiple_of
        if is_flat and self.image_processor is None:
            batch = packed_flat(rows[0], pad_id, multiple)
        else:
            batch = (packed if is_packed else padded)(rows, pad_id, multiple)
        if images:
            batch |= self.maker().inputs(images)
            num_tokens = int((batch["input_ids"] == self.image_token_id).sum())
            assert num_tokens == sum(map(self._num_tokens, images))
        return batch

    def _with_hidden_image(self, rows: Sequence[Row], num_tokens: int) -> list[Row]:
        # Append it to the shortest row, so that the batch grows as little as possible. `lengths` is unchanged: the
        # attention mask (or the positions of packed rows) excludes the appended tokens.
        shortest = min(range(len(rows)), key=lambda row: len(rows[row].input_ids))
        ids, labels = [self.image_token_id] * num_tokens, [IGNORE] * num_tokens
        row = rows[shortest]
        changed = row._replace(input_ids=row.input_ids + ids, labels=row.labels + labels)
        return [*rows[:shortest], changed, *rows[shortest + 1 :]]
