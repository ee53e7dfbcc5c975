"""Call a model's own processor: its tensors, the placeholders of images and videos, token counts, what fits a batch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

from milora_data.batches.record_collator import BLANK
from milora_data.encode.chat_template_mask import VIDEO_MARK, ImageTemplate, PlainPrompt, Rendered, prompt_format
from milora_data.encode.templates import no_videos
from milora_data.pictures.load import ImageError, load_image, picture_size
from milora_data.pictures.videos import Frames, outline, read_video, require_one_size
from milora_data.records.record import IMAGE, VIDEO, Turn, Video
from milora_vl.common.compat.transformers import count_image_tokens, recorded_spans
from milora_vl.common.errors import DataError, Key, UserError, first_line

# What processors raise for pictures and texts that they do not take.
PROCESSOR_ERRORS = (ValueError, TypeError, IndexError, KeyError, RuntimeError, StopIteration, ZeroDivisionError)
SPANS = "spans_of_images"
DEFAULT_FPS = 2.0  # if the processor has no default; Qwen3-VL and GLM-4V have the same


def takes_videos(processor: Any) -> bool:
    return _video_token(processor) is not None


def _video_token(processor: Any) -> str | None:
    try:
        return str(processor.video_token) if processor.video_processor is not None else None
    except AttributeError:
        return None


def _image_tokens(processor: Any) -> set[str]:
    """Return the tokens that a processor or its tokenizer names as a picture's: in texts, and in ids."""
    tokenizer, named = processor.tokenizer, {str(processor.image_token)}
    if "image_token" in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        named.add(str(tokenizer.image_token))
    if "image_token_id" in dir(processor):
        named.add(str(tokenizer.convert_ids_to_tokens(processor.image_token_id)))
    return named


class ProcessorInputs:
    """The inputs of a model for texts with pictures, as its processor makes them."""

    def __init__(self, processor: Any) -> None:
        require_spans()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.format = prompt_format(processor)
        # A few processors replace the placeholder of a picture by another token.
        has_placeholder = "image_placeholder_token" in dir(processor)
        self.placeholder = str(processor.image_placeholder_token if has_placeholder else processor.image_token)
        self.video_placeholder = _video_token(processor)
        self.expanded = _image_tokens(processor) - {self.placeholder, str(self.video_placeholder)}
        self._image_counts: dict[tuple[int, int], int] = {}
        self._video_counts: dict[tuple[Any, ...], int] = {}

    @cached_property
    def video_format(self) -> ImageTemplate | PlainPrompt:
        """How conversations with videos are written: in the model's template, or in the processor's own for videos.

        SmolVLM's processor has one, because the published template omits videos.

        Raises `DataError` for a processor that takes no videos.
        """
        if self.video_placeholder is None:
            raise no_videos(type(self.processor).__name__)
        default = vars(sys.modules[type(self.processor).__module__]).get("DEFAULT_CHAT_TEMPLATE")
        if default is None:
            return self.format
        try:
            written = self.format.render([Turn("user", f"{VIDEO_MARK}\na")], prompt=True).text
        except DataError:
            written = ""
        return self.format if self.video_placeholder in written else ImageTemplate(str(default), self.tokenizer)

    def __call__(
        self,
        rendered: Sequence[Rendered],
        images: Sequence[Sequence[Any]],
        videos: Sequence[Sequence[Frames]] = (),
        *,
        padding_side: str,
        pad_to_multiple_of: int | None = None,
        with_spans: bool = False,
    ) -> dict[str, Any]:
        """Return the processor's tensors for texts with their pictures (PIL) and videos.

        `with_spans` adds offset_mapping (batch, length, 2), the characters of each token in the text with expanded
        placeholders, and SPANS: per text and picture two ranges of characters (start, end), of the placeholder and of
        its replacement.
        """
        texts = [one.text for one in rendered]
        options = {**self._options(texts[0]), "padding_side": padding_side}
        if pad_to_multiple_of:
            options["pad_to_multiple_of"] = pad_to_multiple_of
        if "mm_token_type_ids" in self.processor.model_input_names:
            options["return_mm_token_type_ids"] = True  # a few processors return it only if it is asked for
        if rendered[0].suffix is not None:
            options["suffix"] = [str(one.suffix) for one in rendered]
        shown = [video for row in videos for video in row]
        if shown:
            options |= {"videos": [list(video.frames) for video in shown], "do_sample_frames": False}
            if any(video.fps or video.file for video in shown):
                options["video_metadata"] = [video.metadata() for video in shown]
        if shown and any(images):
            self.require_one_kind(1, [1])
        pictures = [list(row) for row in images] if any(images) else None
        if pictures and not all(images) and not self.takes_mixed_rows:
            if self.by_cross_attention:
                how = {
                    "padding_side": padding_side,
                    "pad_to_multiple_of": pad_to_multiple_of,
                    "with_spans": with_spans,
                }
                return self._in_two_parts(rendered, images, how)
            message = f"{type(self.processor).__name__} cannot put texts with and without pictures into one batch"
            raise DataError(message, code="records-mixed", hint="make batches of one kind")
        with recorded_spans(self.processor) as spans:
            if with_spans:
                options["return_offsets_mapping"] = True
            batch = dict(self.processor(text=texts, images=pictures, **options))
        for name, value in batch.items():  # pixels in a half type (Llama 4) become float32, as for all other families
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                batch[name] = value.float()
        # Without spans, this family expands no placeholder.
        return batch | ({SPANS: spans or [[] for _ in texts]} if with_spans else {})

    def _in_two_parts(
        self, rendered: Sequence[Rendered], images: Sequence[Sequence[Any]], how: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the batch of rows with and without pictures, padded on the right, of a model with cross-attention."""
        parts = []
        for has_pictures in (True, False):
            rows = [row for row, shown in enumerate(images) if bool(shown) == has_pictures]
            parts.append((rows, self([rendered[row] for row in rows], [images[row] for row in rows], **how)))
        width = max(part["input_ids"].shape[1] for _, part in parts)
        batch: dict[str, Any] = {}
        for name, value in parts[1][1].items():
            if isinstance(value, torch.Tensor):
                fill = self.tokenizer.pad_token_id if name == "input_ids" else 0
                batch[name] = value.new_full((len(images), width, *value.shape[2:]), fill)
                for rows, part in parts:
                    batch[name][rows, : part[name].shape[1]] = part[name]
            else:
                batch[name] = [value[0]] * len(images)  # the family expands no placeholder
        shown_rows, shown = parts[0]
        return with_unseen_pictures(batch, shown, shown_rows)

    @cached_property
    def by_cross_attention(self) -> bool:
        """Whether the model reads pictures by cross-attention (Llama 3.2 Vision), as the names of its inputs say."""
        return "aspect_ratio_mask" in self.processor.model_input_names

    @cached_property
    def plain_picture(self) -> dict[str, Any]:
        """The tensors of one row that shows a small plain picture."""
        shown = self.format.render([Turn("user", IMAGE), Turn("assistant", "a")])
        return self([shown], [[self.blank(*BLANK)]], padding_side="right")

    @cached_property
    def hidden_video(self) -> dict[str, Any]:
        """The tensors of one row that shows a small plain video."""
        text = self._alone(str(self.video_placeholder))
        return self([text], [[]], [[Frames((self.blank(*BLANK),) * 2)]], padding_side="right")

    @property
    def takes_videos_apart(self) -> bool:
        """Whether pictures and videos of one batch go through the vision tower one after the other."""
        return self.takes_images_and_videos and "pixel_values_videos" in self.hidden_video

    @cached_property
    def takes_mixed_videos(self) -> bool:
        """Whether videos of different numbers of frames fit into one batch; some processors stack all frames."""
        if self.video_placeholder is None:
            return True  # the collator reports the video
        text = self._alone(self.video_placeholder)
        videos = [[Frames((self.blank(*BLANK),) * count)] for count in (2, 4)]
        try:
            self([text, text], [[], []], videos, padding_side="right")
        except PROCESSOR_ERRORS:
            return False
        return True

    @cached_property
    def takes_mixed_rows(self) -> bool:
        """Whether texts with and without pictures fit into one batch, in any order; some processors fail or mix up."""
        bos = self.tokenizer.bos_token or ""
        texts, pictures = [f"{bos}{self.placeholder}a", f"{bos}a"], [[self.blank(*BLANK)], []]
        options = self._options(texts[0])
        try:
            batches = [self.processor(text=texts[::step], images=pictures[::step], **options) for step in (1, -1)]
        except PROCESSOR_ERRORS:
            return False
        first, second = ({name: tuple(tensor.shape) for name, tensor in batch.items()} for batch in batches)
        return first == second

    @cached_property
    def takes_images_and_videos(self) -> bool:
        """Whether a batch may have both, for a processor that takes videos.

        A model fails if both come under one name (SmolVLM), and if a video is written with the token of a picture while
        its pixels come apart (GLM-4V): it then compares the tokens with the pictures alone.
        """
        try:
            names = [
                set(part.model_input_names) for part in (self.processor.image_processor, self.processor.video_processor)
            ]
        except AttributeError:
            return True
        if names[0] & names[1]:
            return False
        try:
            batch = self.hidden_video
        except PROCESSOR_ERRORS:
            return True  # the collator reports the video
        picture = self.tokenizer.convert_tokens_to_ids(self.placeholder)
        return not ("pixel_values_videos" in batch and bool((batch["input_ids"] == picture).any()))

    def end_ids(self) -> list[int]:
        """Return the id of the special token that ends an answer in the chat template, if it has one."""
        return [] if self.format.end is None else [int(self.tokenizer.convert_tokens_to_ids(self.format.end))]

    def num_placeholders(self, text: str) -> int:
        return text.count(self.placeholder)

    def num_videos(self, text: str) -> int:
        return text.count(self.video_placeholder) if self.video_placeholder else 0

    def may_refuse(self, turns: Sequence[Turn], num_images: int, num_videos: int = 0) -> bool:
        """Return whether marks or media tokens of the texts do not fit. It runs no template: there may be millions."""
        text = "".join([turn.text for turn in turns])
        if text.count(IMAGE) != num_images or (num_videos and text.count(VIDEO) != num_videos):
            return True
        others = text.replace(IMAGE, "")  # some families have the marks as their tokens
        others = others.replace(VIDEO, "") if num_videos else others
        return any(token in others for token in (self.placeholder, *self.expanded, self.video_placeholder) if token)

    def require_images(self, text: str, num_images: int, num_videos: int = 0) -> None:
        """Raise `DataError` if a rendered text has not one placeholder per picture and per video."""
        expected = [("picture", self.placeholder, num_images)]
        if self.video_placeholder is not None and (num_videos or self.video_placeholder != self.placeholder):
            expected.insert(0, ("video", self.video_placeholder, num_videos))
        expected += [("part of a picture", token, 0) for token in self.expanded if token in text]
        for what, token, number in expected:
            found = text.count(token)
            if found > number:
                message = f"{found} {what} tokens, but {number} {what}s: a text contains the {what} token ({token})"
                hint = "remove the token from the text"
                raise DataError(message, code="record-image-token-in-text", hint=hint)
            if found < number:
                message = f"the chat template writes {found} of {number} {what}s of this record"
                hint = f"it may take {what}s only in turns of the user, or take no {what}s"
                raise DataError(message, code="chat-template-no-pictures", hint=hint)

    def require_one_kind(self, num_images: int, frames: Sequence[int]) -> None:
        """Raise `DataError` for pictures beside videos, or videos of several numbers of frames, if these do not fit."""
        name = type(self.processor).__name__
        if num_images and frames and not self.takes_images_and_videos:
            message, hint = f"{name} takes no pictures beside videos", "leave out the pictures or the videos"
            raise DataError(message, code="records-mixed", hint=hint)
        if len(set(frames)) > 1 and not self.takes_mixed_videos:
            message = f"videos of {min(frames)} and {max(frames)} frames together, which {name} cannot take"
            raise DataError(message, code="records-mixed", hint="use as many frames for each video")

    def num_text_tokens(self, rendered: Rendered) -> int:
        text = rendered.text + (rendered.suffix or "")
        ids = self.tokenizer(text, add_special_tokens=self._adds_bos(text))["input_ids"]
        return len(ids) - self.num_placeholders(text) - self.num_videos(text)

    def num_tokens(
        self,
        rendered: Rendered,
        sizes: Sequence[tuple[int, int]],
        videos: Sequence[Frames | Video],
    ) -> int:
        """Return the number of tokens of a text with its images, given as (height, width), and its videos."""
        shown = sum(self._of_image(size) for size in sizes) + sum(map(self._of_video, videos))
        return self.num_text_tokens(rendered) + shown

    def _of_image(self, size: tuple[int, int]) -> int:
        """Return the number of tokens of an image, without pixels where the processor can count.

        The number is exact for a record with one image; a few families spend fewer tokens on each of several.
        """
        if size not in self._image_counts:
            counted = self._counted(size)
            grey = [self.blank(*size)] if counted is None else []
            self._image_counts[size] = self._measured(grey, []) if counted is None else counted + self._frame
        return self._image_counts[size]

    def _of_video(self, video: Frames | Video) -> int:
        """Return the tokens of a video, counted with grey frames of its size; 0 if it cannot be read."""
        try:
            grey = self._grey_video(video)
        except ImageError:  # the collator raises, or skips the record
            return 0
        key = (len(grey.frames), grey.frames[0].size, repr(grey.metadata()))
        if key not in self._video_counts:
            self._video_counts[key] = self._measured([], [grey])
        return self._video_counts[key]

    def _counted(self, size: tuple[int, int]) -> int | None:
        """Return the processor's own count, which serving engines use; None if it has none."""
        try:
            return count_image_tokens(self.processor, size)
        except (AttributeError, NotImplementedError, *PROCESSOR_ERRORS):
            return None

    @cached_property
    def _frame(self) -> int:
        """The number of tokens around an image that the processor's own count leaves out."""
        return self._measured([self.blank(*BLANK)], []) - (self._counted(BLANK) or 0)

    def _measured(self, images: list[Any], videos: list[Frames]) -> int:
        """Return the number of tokens of one image or one video: a batch's without the text's."""
        text = self._alone(self.placeholder if images else str(self.video_placeholder))
        try:
            batch = self([text], [images], [videos], padding_side="right")
        except PROCESSOR_ERRORS:
            return 1  # the collator reports it
        return len(batch["input_ids"][0]) - self.num_text_tokens(text)

    def _alone(self, text: str) -> Rendered:
        return Rendered((self.tokenizer.bos_token or "") + text, ())

    def frames(self, video: Frames | Video) -> Frames:
        """Return the frames of a video whose files have their paths. Raises `ImageError`."""
        if isinstance(video, Frames):
            return video
        if video.file is not None:
            return read_video(video.file, self._sampler(video))
        return Frames(require_one_size(list(map(load_image, video.frames)), str(video.frames[0])), video.fps)

    def num_frames(self, video: Frames | Video) -> int:
        """Return the number of frames of a video, where it decides which videos fit into one batch, else 1 of a file.

        A file is opened only if its own length decides.
        """
        if isinstance(video, Frames) or video.file is None:
            return len(video.frames)
        if self.takes_mixed_videos:
            return 1
        chooser = self._sampler(video)
        if chooser.num_frames is not None:
            return int(chooser.num_frames)
        try:
            return len(outline(video.file, chooser)[1])
        except ImageError:  # the collator reports it
            return 1

    def _grey_video(self, video: Frames | Video) -> Frames:
        """Return a video of the same size with grey frames. Raises `ImageError` for a broken one."""
        if isinstance(video, Frames):
            return video._replace(frames=(self.blank(*video.frames[0].size[::-1]),) * len(video.frames))
        if video.file is None:
            return Frames((self.blank(*picture_size(video.frames[0])),) * len(video.frames), video.fps)
        metadata, indices = outline(video.file, self._sampler(video))
        grey = self.blank(metadata.height or 0, metadata.width or 0)
        return Frames((grey,) * len(indices), None, {**metadata, "frames_indices": indices})

    def _sampler(self, video: Video) -> Any:
        if self.video_placeholder is None:
            raise no_videos(type(self.processor).__name__)
        return sampler(self.processor.video_processor, video.fps, video.num_frames)

    def _options(self, text: str) -> dict[str, Any]:
        return {"padding": True, "return_tensors": "pt", "add_special_tokens": self._adds_bos(text)}

    def _adds_bos(self, text: str) -> bool:
        # A template that writes the BOS gets no second one, as in transformers' apply_chat_template.
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def blank(self, height: int, width: int) -> Any:
        from PIL import Image

        return Image.new("RGB", (width, height), (127, 127, 127))


def with_unseen_pictures(batch: dict[str, Any], shown: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return a batch of texts with the pictures of a batch for cross-attention, whose i-th row is `rows[i]` here.

    All other rows get the padding that the processor gives to a row with fewer pictures; no token attends to it.
    """
    count, width = batch["input_ids"].shape
    batch = dict(batch)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"):
        value = shown[name]
        if name == "cross_attention_mask":  # (rows, length, pictures, tiles)
            value = F.pad(value, (0, 0, 0, 0, 0, width - value.shape[1]))
        batch[name] = value.new_zeros(count, *value.shape[1:])
        batch[name][list(rows)] = value[: len(rows)]
    unseen = [row for row in range(count) if row not in rows]
    batch["aspect_ratio_mask"][unseen, :, 0] = 1
    return batch


def require_spans() -> None:
    """Raise `UserError` if transformers is too old for processors that report where they expand placeholders."""
    import transformers

    if "get_text_with_replacements" not in dir(transformers.ProcessorMixin):
        message = f"pictures of this model need transformers 5.18, found {transformers.__version__}"
        raise UserError(message, code="package-version", hint='pip install "transformers>=5.18"')


@dataclass(frozen=True, slots=True)
class ProcessorSettings:
    """What a recipe says about the sizes of pictures and videos, and about the frames of video files; None: nothing."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None

    @property
    def of_videos(self) -> list[str]:
        names = ("video_min_pixels", "video_max_pixels", "fps", "num_frames")
        return [name for name in names if getattr(self, name) is not None]


# An image processor whose longest edge is by default larger than any side counts pixels of the whole picture there.
_LONGEST_SIDE = 65_536


def usable_inputs(processor: Any, name: str) -> ProcessorInputs:
    try:
        inputs = ProcessorInputs(processor)
        prompt = _asked(inputs)
        batch = inputs([prompt], [[inputs.blank(*BLANK)]], padding_side="right", with_spans=True)
        if "offset_mapping" not in batch:
            raise ValueError("it returns no character offsets, which the loss mask needs")
        expanded, is_reported = batch["offset_mapping"].shape[1] - inputs.num_text_tokens(prompt), any(batch[SPANS])
    except UserError:
        raise
    except (AttributeError, *PROCESSOR_ERRORS) as error:
        raise _unsupported(processor, name, first_line(error)) from None
    if len(batch[SPANS]) != 1:
        raise _unsupported(processor, name, f"it makes {len(batch[SPANS])} texts of one")
    if expanded > 2 and not is_reported:  # more than a BOS and a token: the labels would be wrong
        raise _unsupported(processor, name, "it does not report where in a text it puts the tokens of a picture")
    return inputs


def _asked(inputs: ProcessorInputs) -> Rendered:
    """Return a question about a picture in the model's template; the placeholder alone if it writes no pictures."""
    if not inputs.format.takes_conversations:
        return Rendered(inputs.placeholder, (), "")
    try:
        asked = inputs.format.render([Turn("user", f"{IMAGE}\na")], prompt=True)
    except DataError:  # the records may have no pictures
        asked = Rendered("", ())
    return asked if inputs.num_placeholders(asked.text) else Rendered(inputs.placeholder, ())


def _unsupported(processor: Any, name: str, reason: str) -> UserError:
    return UserError(
        f"pictures of {name} cannot be prepared with {type(processor).__name__}: {reason}",
        hint="apply_milora still works, with your own batches and trainer\nsee: docs/models.md",
    )


def configure_processor(processor: Any, data: ProcessorSettings) -> None:
    """Set what a recipe says about the sizes of pictures and videos, and about the frames of video files."""
    limit_pixels(processor, data.min_pixels, data.max_pixels)
    if data.of_videos and not takes_videos(processor):
        raise no_videos(type(processor).__name__, Key(("data", data.of_videos[0])))
    if data.video_min_pixels is not None or data.video_max_pixels is not None:
        _limit(processor.video_processor, data.video_min_pixels, data.video_max_pixels, "video_")
    if data.fps is not None or data.num_frames is not None:
        processor.video_processor = sampler(processor.video_processor, data.fps, data.num_frames, section="data")


def sampler(video_processor: Any, fps: float | None = None, num_frames: int | None = None, *, section: str = "") -> Any:
    """Return a video processor that samples `fps` frames per second or `num_frames` frames of each file.

    Without either, its own setting counts, else `DEFAULT_FPS`. Raises `DataError` for a processor that does not sample
    by the setting (GLM-4V knows no `num_frames`), at its key in the `section` of a recipe, if one is named.
    """
    if fps is None and num_frames is None:
        if video_processor.fps is not None or video_processor.num_frames is not None:
            return video_processor
        fps = DEFAULT_FPS
    name, other, value = ("num_frames", "fps", num_frames) if fps is None else ("fps", "num_frames", fps)
    if name not in signature(video_processor.sample_frames).parameters:
        message = f"{type(video_processor).__name__} does not choose frames by {name}"
        where = Key((section, name)) if section else ""
        raise DataError(message, code="video-sampling-unsupported", where=where, hint=f"use {other}")
    changed = copy(video_processor)
    # A default for the other setting would overrule this one. SmolVLM has both, and needs them: it reads `fps` frames
    # per second, and `num_frames` at most.
    if video_processor.fps is None or video_processor.num_frames is None:
        setattr(changed, other, None)
    setattr(changed, name, value)
    changed.do_sample_frames = True
    return changed


def limit_pixels(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    if min_pixels is not None or max_pixels is not None:
        _limit(processor.image_processor, min_pixels, max_pixels)


def _limit(part: Any, min_pixels: int | None, max_pixels: int | None, prefix: str = "") -> None:
    kind, what = type(part), "videos" if prefix else "pictures"
    usual = dict(kind.size or {}) if "size" in dir(kind) else {}
    if (usual.get("longest_edge") or 0) < _LONGEST_SIDE or "shortest_edge" not in usual:
        raise UserError(
            f"{kind.__name__} resizes {what} to fixed sizes ({dict(part.size)})",
            code="pixels-unsupported",
            where=Key.of(f"data.{prefix}min_pixels" if max_pixels is None else f"data.{prefix}max_pixels"),
            hint="remove the limit; models of the Qwen-VL and GLM-V families have one",
        )
    size = dict(part.size)
    least, most = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
    if least > most:
        message = f"{what} of at least {least:,} and at most {most:,} pixels"
        hint = f"set both --{prefix}min_pixels and --{prefix}max_pixels"
        raise UserError(message, where=Key.of(f"data.{prefix}min_pixels"), hint=hint)
    part.size = type(part.size)(shortest_edge=least, longest_edge=most)
