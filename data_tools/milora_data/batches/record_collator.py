"""The interface of collators, and what all share: broken records raise, or are skipped and counted."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import get_worker_info

from milora_data.encode.labels import NoSupervisedTokens
from milora_data.encode.templates import Segment
from milora_data.encode.tokens import IGNORE
from milora_data.pictures.load import ImageError, ImagePolicy, Picture, picture_size
from milora_data.records import parse_record
from milora_data.records.boxes import Boxes
from milora_data.records.record import Record, with_boxes
from milora_vl.common.compat.torch import FailedBatch
from milora_vl.common.errors import DataError, UserError, with_context

log = logging.getLogger(__name__)

BLANK = (64, 64)  # height and width of the image that replaces one without pixels
_MAX_WORKERS = 256
_COUNTERS = ("skipped", "unlearnable", "cut", "broken")

RecordLike = Record | Mapping[str, Any] | UserError
Sample = TypeVar("Sample")
Given = TypeVar("Given")
Made = TypeVar("Made")


class RecordCollator(ABC, Generic[Sample]):
    """Makes a batch of records; a subclass reads one record as a `Sample` and makes the batch of several.

    A list of records in place of a record is packed into one row. Without pixels, a collator also counts the tokens of
    a record (`num_tokens`, `num_supervised`), shows its text (`segments`), and names the records that no batch can use
    (`require_usable`) and which fit into one batch (`kind`, `require_one_batch`).

    In a loader process, an error becomes a `FailedBatch`; the loader raises the error in the main process.

    `bad_images` decides what happens to a picture that cannot be read: `raise`, or `skip` its record. Records without
    supervised tokens are skipped. Broken records (a stream yields a `DataError` in their
    place) are skipped unless `bad_images` is `raise`. Each case is logged and counted in `counts()`. If a batch has no
    record left, the first usable one of `substitutes` replaces it, else the last good record. For an evaluation, where
    that would add a record of the training to the loss, such a batch has no labels (`for_evaluation`).
    """

    boxes: Boxes  # how the model writes boxes
    is_evaluating = False
    is_causal = False  # in the model, no position of a batch sees a later one
    always_shows_images = False  # a batch without images gets a plain one, so that all processes run the vision tower
    always_shows_videos = False  # beside it, a batch without videos gets a plain one: the data has pictures and videos
    length_by_size = True  # the number of tokens of an image depends on its size

    def __init__(
        self,
        bad_images: ImagePolicy = "raise",
        substitutes: Sequence[RecordLike] = (),
        *,
        image_folder: str | Path | None = None,
        max_length: int | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length must be at least 1, got {max_length}", code="flag-value")
        self.bad_images = bad_images
        self.image_folder = Path(image_folder or "")
        self.max_length = max_length
        self._untried = list(reversed(substitutes))
        self._substitute_sample: Sample | None = None
        self._last_sample: Sample | None = None
        self._has_substitute = False  # in the present batch, which then holds nothing else
        self.left_out = set[str]()  # places of records that the present batch leaves out
        # Shared memory, one row per loader process: loader processes count, the main process reports.
        self._counts = torch.zeros(_MAX_WORKERS, len(_COUNTERS), dtype=torch.long).share_memory_()

    def __call__(self, records: Sequence[RecordLike | Sequence[RecordLike]]) -> dict[str, Any]:
        """Return the batch of `records`; raises `DataError` with file and line."""
        if get_worker_info() is None:
            return self._made(records)
        try:
            return self._made(records)
        except UserError as error:
            return FailedBatch(error)  # type: ignore[return-value]  # the loader raises it

    def num_tokens(self, record: Record) -> int:
        """Return the number of tokens of a record, at most `max_length`, from its text and the sizes of its images."""
        length = self.full_length(record)
        return length if self.max_length is None else min(length, self.max_length)

    def _size(self, picture: Picture) -> tuple[int, int]:
        """Return (height, width) of an image; an unreadable one, whose record a batch skips, is small."""
        try:
            return picture_size(picture.within(self.image_folder))
        except ImageError:
            return BLANK

    def _with_boxes(self, record: Record) -> Record:
        """Return the record with its boxes as the model writes them. Raises `DataError`."""
        try:
            turns = with_boxes(record.turns, self.boxes, lambda: [self._size(name) for name in record.images])
        except DataError as error:
            raise with_context(error, record.place) from None
        return record if turns is record.turns else replace(record, turns=tuple(turns))

    @abstractmethod
    def full_length(self, record: Record) -> int:
        """Return the number of tokens of a record before `max_length` cuts it. Raises `DataError`."""

    @abstractmethod
    def num_supervised(self, record: Record) -> int:
        """Return the number of supervised tokens of a record before `max_length` cuts it. Raises `DataError`."""

    @abstractmethod
    def segments(self, record: Record) -> list[Segment]:
        """Return the text of a record in pieces, supervised or not, with `<image>` for each image."""

    @abstractmethod
    def require_usable(self, record: Record) -> None:
        """Raise `DataError` for a record that no batch can use: also if `max_length` cuts off all of its answers."""

    @abstractmethod
    def length_settings(self) -> str:
        """Return a text with all settings on which `full_length` depends."""

    def kind(self, record: Record) -> Hashable:
        """Return what of a record decides how it is written and which records share its batch."""
        return bool(record.images)

    def may_refuse(self, record: Record) -> bool:
        """Return whether the texts of a record may be refused though others of its form are not; runs no template."""
        try:
            self._with_boxes(record)
        except DataError:
            return True
        return False

    def require_one_batch(self, records: Sequence[Record]) -> None:
        """Raise `DataError`, with the places of two, if records of these kinds do not fit into one batch."""

    def counts(self) -> dict[str, int]:
        """Return how many records were skipped, unlearnable or cut, in all loader processes."""
        return dict(zip(_COUNTERS, self._counts.sum(0).tolist(), strict=True))

    def for_evaluation(self) -> RecordCollator[Sample]:
        """Return a collator that counts with this one, and whose batches of substitutes have no labels."""
        other = copy(self)
        other.is_evaluating = True
        return other

    def _made(self, records: Sequence[RecordLike | Sequence[RecordLike]]) -> dict[str, Any]:
        self._has_substitute, self.left_out = False, set()
        batch = self._collated(records)
        if self.is_evaluating and self._has_substitute:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE)
        return batch

    @abstractmethod
    def _collated(self, records: Sequence[RecordLike | Sequence[RecordLike]]) -> dict[str, Any]: ...

    @abstractmethod
    def _read(self, record: Record) -> Sample: ...

    def _sample(self, item: RecordLike) -> Sample | None:
        """Return what the batch needs of an item; None if the policy leaves it out."""
        record = self._kept(record_of, item, "")
        return None if record is None else self._kept(self._read, record, record.place)

    def _kept(self, read: Callable[[Given], Made], value: Given, record: str) -> Made | None:
        """Return `read(value)`; None if it raises `DataError` and the policy leaves the record out."""
        try:
            return read(value)
        except DataError as error:
            self._leave_out_or_raise(error, record)
            return None

    def _leave_out_or_raise(self, error: DataError, record: str) -> None:
        """Count and report the error of a record, or raise it, as `bad_images` says."""
        self.left_out.add(record)
        if isinstance(error, NoSupervisedTokens):
            self._leave_out("unlearnable", error)
        elif self.bad_images != "raise":
            self._leave_out("skipped" if isinstance(error, ImageError) else "broken", error)
        elif isinstance(error, ImageError):
            raise needed_by(error, record) from None
        else:
            raise error

    def _leave_out(self, counter: str, error: DataError) -> None:
        self._count(counter)
        log.warning("left out: %s", error)

    def _substitute(self) -> Sample:
        # A step must have a batch on every rank. `substitutes` come first: the last good record depends on where a run
        # was resumed, they do not.
        while self._substitute_sample is None and self._untried:
            item = self._untried.pop()
            try:
                self._substitute_sample = self._read(record_of(item))
            except DataError:
                continue  # reported when the record comes up in a batch
        self._has_substitute = True
        sample = self._substitute_sample or self._last_sample
        if sample is None:
            message = "every record of the first batch was left out"
            raise DataError(message, hint="see the warnings above")
        return sample

    def _count(self, counter: str) -> None:
        worker = get_worker_info()
        self._counts[worker.id % (_MAX_WORKERS - 1) + 1 if worker else 0, _COUNTERS.index(counter)] += 1


def needed_by(error: ImageError, record: str) -> ImageError:
    return with_context(error, hint=f'needed by {record}; --bad_images skip leaves it out (bad_images="skip")')


def record_of(item: RecordLike) -> Record:
    """Return an item as a `Record`. Raises `DataError`, also if the item is the error of a broken record or stream."""
    if isinstance(item, UserError):
        raise item
    return item if isinstance(item, Record) else parse_record(item)


def pad_id_of(tokenizer: Any) -> int:
    """Return the id that fills rows; it is masked everywhere, so EOS replaces a missing pad token."""
    pad_id = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad_id is None else pad_id)
