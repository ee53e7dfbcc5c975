"""The number of tokens of an image or a video, as a model's own processor counts it: mostly without pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from milora_data.batches.processor_inputs import BLANK, PROCESSOR_ERRORS, ProcessorInputs, as_named
from milora_data.encode.chat_template_mask import Rendered
from milora_data.pictures.files import ImageError
from milora_data.pictures.videos import Frames
from milora_data.records.record import Video
from milora_vl.common.compat.transformers import count_image_tokens


class ProcessorImageTokens:
    """Counts the tokens of images and videos of one processor; equal sizes are counted once."""

    def __init__(self, inputs: ProcessorInputs) -> None:
        self.inputs = inputs
        self._counts: dict[tuple[int, int], int] = {}
        self._video_counts: dict[tuple[Any, ...], int] = {}

    def of_text(
        self,
        rendered: Rendered,
        sizes: Sequence[tuple[int, int]],
        videos: Sequence[Frames | Video],
        place: Callable[[str], str | Path] = as_named,
    ) -> int:
        """Return the number of tokens of a text with its images, of which it needs (height, width), and its videos."""
        shown = sum(self.of_image(*size) for size in sizes) + sum(self.of_video(video, place) for video in videos)
        return self.inputs.num_text_tokens(rendered) + shown

    def of_image(self, height: int, width: int) -> int:
        """Return the number of tokens of an image, without pixels where the processor can count.

        The number is exact for a record with one image; a few families spend fewer tokens on each of several.
        """
        size = (height, width)
        if size not in self._counts:
            counted = self._counted(size)
            self._counts[size] = self._measured(size) if counted is None else counted + self._frame
        return self._counts[size]

    def of_video(self, video: Frames | Video, place: Callable[[str], str | Path] = as_named) -> int:
        """Return the number of tokens of a video, as the processor counts grey frames of its size.

        A video that cannot be read counts as a small one.
        """
        try:
            grey = self.inputs.grey_video(video, place)
        except ImageError:  # the collator skips the record, or replaces the video by a plain one
            grey = self.inputs.plain_video(video)
        first = grey.frames[0]
        key = (len(grey.frames), first.size, repr(grey.metadata()))
        if key not in self._video_counts:
            text = Rendered((self.inputs.tokenizer.bos_token or "") + str(self.inputs.video_placeholder), ())
            try:
                batch = self.inputs([text], [[]], [[grey]], padding_side="right")
                self._video_counts[key] = len(batch["input_ids"][0]) - self.inputs.num_text_tokens(text)
            except PROCESSOR_ERRORS:
                self._video_counts[key] = 1  # the collator reports the video
        return self._video_counts[key]

    def _counted(self, size: tuple[int, int]) -> int | None:
        """Return the processor's own count, which serving engines use; None if it has none."""
        try:
            return count_image_tokens(self.inputs.processor, size)
        except (AttributeError, NotImplementedError, *PROCESSOR_ERRORS):
            return None

    @cached_property
    def _frame(self) -> int:
        """The number of tokens around an image that the processor's own count leaves out."""
        return self._measured(BLANK) - (self._counted(BLANK) or 0)

    def _measured(self, size: tuple[int, int]) -> int:
        """Return the number of tokens of a grey image of this size."""
        text = Rendered((self.inputs.tokenizer.bos_token or "") + self.inputs.placeholder, ())
        try:
            batch = self.inputs([text], [[self.inputs.blank(*size)]], padding_side="right")
        except PROCESSOR_ERRORS:
            return 1  # the collator reports the image
        return len(batch["input_ids"][0]) - self.inputs.num_text_tokens(text)
