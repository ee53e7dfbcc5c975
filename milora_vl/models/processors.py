"""Models whose own processor prepares the pictures: pixel limits (`min_pixels`, `max_pixels`), refusals."""

from __future__ import annotations

from typing import Any

from milora_data.batches.processor_inputs import BLANK, PROCESSOR_ERRORS, ProcessorInputs
from milora_data.encode.chat_template import Rendered
from milora_vl.base.errors import Key, UserError, first_line

# An image processor whose longest edge is by default larger than any side counts pixels of the whole picture there.
_LONGEST_SIDE = 65_536


def usable_inputs(processor: Any, name: str) -> ProcessorInputs:
    """Return the inputs of a processor after preparing one picture with it.

    Raises UserError with the reason for a processor that does not take texts with pictures in their places.
    """
    try:
        inputs = ProcessorInputs(processor)
        blank = Rendered(inputs.placeholder, (), None if inputs.format.takes_conversations else "")
        inputs([blank], [[inputs.blank(*BLANK)]], padding_side="right", with_places=True)
    except UserError:
        raise
    except (AttributeError, *PROCESSOR_ERRORS) as error:
        raise UserError(
            f"pictures of {name} cannot be prepared with {type(processor).__name__}: {first_line(error)}",
            code="model-pictures-unsupported",
            hint="apply_milora still works, with your own batches and trainer\nsee: docs/other-models.md",
        ) from None
    return inputs


def limit_pixels(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set how many pixels a picture has at least and at most after the processor has resized it.

    Raises UserError if the limits contradict each other, or for a processor that resizes to fixed sizes.
    """
    if min_pixels is None and max_pixels is None:
        return
    pictures = processor.image_processor
    kind = type(pictures)
    usual = dict(kind.size or {}) if "size" in dir(kind) else {}
    if (usual.get("longest_edge") or 0) < _LONGEST_SIDE or "shortest_edge" not in usual:
        raise UserError(
            f"{kind.__name__} resizes pictures to fixed sizes ({dict(pictures.size)})",
            code="pixels-unsupported",
            where=Key.of("data.min_pixels" if max_pixels is None else "data.max_pixels"),
            hint="remove the limit; models of the Qwen-VL and GLM-V families have one",
        )
    size = dict(pictures.size)
    least, most = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
    if least > most:
        raise UserError(
            f"pictures of at least {least:,} and at most {most:,} pixels",
            code="pixels-contradiction",
            where=Key.of("data.min_pixels"),
            hint="set both --min_pixels and --max_pixels",
        )
    pictures.size = type(pictures.size)(shortest_edge=least, longest_edge=most)
