"""Processors of models: fields that LLaVA's lack, limits of pixels and frames, and whether one can be used at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from milora_data.batches.processor_inputs import BLANK, PLACES, PROCESSOR_ERRORS, ProcessorInputs, takes_videos
from milora_data.encode.chat_template_mask import Rendered
from milora_data.encode.templates import no_videos
from milora_data.pictures.videos import sampler
from milora_data.records.record import IMAGE, Turn
from milora_vl.common.errors import DataError, Key, UserError, at_flag, first_line
from milora_vl.models.llava import extra_tokens, is_llava


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


def split_processor(processor: Any) -> tuple[Any, Any | None]:
    from transformers import ProcessorMixin

    if isinstance(processor, ProcessorMixin):
        return processor.tokenizer, processor.image_processor
    return processor, None


def complete_processor(processor: Any, config: Any) -> None:
    """Set the fields that the processor needs to count image tokens, and square padding as in LLaVA-1.5."""
    if not is_llava(config):
        return
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = extra_tokens(config)
    if config.model_type == "llava_next":
        processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
    elif type(processor.image_processor).__name__.startswith("LlavaImageProcessor"):  # ...Fast, ...Pil
        processor.image_processor.do_pad = True


# An image processor whose longest edge is by default larger than any side counts pixels of the whole picture there.
_LONGEST_SIDE = 65_536


def usable_inputs(processor: Any, name: str) -> ProcessorInputs:
    try:
        inputs = ProcessorInputs(processor)
        prompt = _asked(inputs)
        batch = inputs([prompt], [[inputs.blank(*BLANK)]], padding_side="right", with_places=True)
        if "offset_mapping" not in batch:
            raise ValueError("it returns no character offsets, which the loss mask needs")
        expanded, is_reported = batch["offset_mapping"].shape[1] - inputs.num_text_tokens(prompt), any(batch[PLACES])
    except UserError:
        raise
    except (AttributeError, *PROCESSOR_ERRORS) as error:
        raise _unsupported(processor, name, first_line(error)) from None
    if len(batch[PLACES]) != 1:
        raise _unsupported(processor, name, f"it makes {len(batch[PLACES])} texts of one")
    if expanded > 2 and not is_reported:  # more than a BOS and a token: answers would be looked for in the wrong places
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
        with at_flag(Key.of(f"data.{data.of_videos[0]}")):
            raise no_videos(type(processor).__name__)
    if data.video_min_pixels is not None or data.video_max_pixels is not None:
        _limit(processor.video_processor, data.video_min_pixels, data.video_max_pixels, "video_")
    if data.fps is not None or data.num_frames is not None:
        with at_flag(Key.of("data.num_frames" if data.fps is None else "data.fps")):
            processor.video_processor = sampler(processor.video_processor, data.fps, data.num_frames)


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
