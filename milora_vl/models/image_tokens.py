"""Pictures of a model: token counts, the image token, missing fields of a processor, processors that prepare them."""

from __future__ import annotations

from typing import Any

import torch

from milora_data.batches.processor_inputs import BLANK, PROCESSOR_ERRORS, ProcessorInputs
from milora_data.encode.chat_template import Rendered
from milora_data.pictures.anyres import Tiling
from milora_vl.base.errors import Key, UserError, first_line

LLAVAS = ("llava", "llava_next")
# Common towers; the tokens of others are counted on the meta device.
EXTRA_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "milora_timm_tower": 0}


def is_llava(config: Any) -> bool:
    """Return whether the model is a LLaVA-1.5 or LLaVA-1.6, whose pictures take a number of tokens known here.

    Pixtral has the same model type, but the size of a picture decides how many tokens it takes.
    """
    return config.model_type in LLAVAS and config.vision_config.model_type != "pixtral"


def uses_processor(config: Any) -> bool:
    """Return whether the pictures of a model are prepared by its own processor: every model but the LLaVAs."""
    return "vision_config" in config.to_dict() and not is_llava(config)


def tiling_of(config: Any) -> Tiling | None:
    """Return how a LLaVA-1.6 model tiles images; None for models without tiles."""
    if config.model_type != "llava_next":
        return None
    vision = config.vision_config
    pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    return Tiling(pinpoints, vision.image_size, vision.image_size // vision.patch_size)


def image_token_id(config: Any) -> int:
    """Return the id of the image token in the prompt."""
    return int(config.image_token_id)


def image_tokens(config: Any) -> int:
    """Return the number of tokens of an image, from the sizes of the tower; with tiles: of 640 x 480 pixels.

    The model must be a LLaVA (`is_llava`).
    """
    tiling = tiling_of(config)
    if tiling is not None:
        return tiling.num_tokens(480, 640)
    dropped = config.vision_feature_select_strategy == "default"
    return _patches(config) + extra_tokens(config) - int(dropped)


def extra_tokens(config: Any) -> int:
    """Return the number of class and register tokens of the tower of a LLaVA."""
    vision = config.vision_config
    if vision.model_type in EXTRA_TOKENS or config.model_type != "llava":
        return EXTRA_TOKENS.get(vision.model_type, 0)
    return count_tokens(vision, layers_of(config)[0]) - _patches(config)


def layers_of(config: Any) -> list[int]:
    """Return the layers of the tower whose features the projector reads: one, or several that are joined."""
    layers = config.to_dict().get("vision_feature_layer", -1)
    return [layers] if isinstance(layers, int) else list(layers)


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


def _patches(config: Any) -> int:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size if "patch_size" in dir(vision) else vision.grid
    return int(side * side)


def count_tokens(config: Any, layer: int) -> int:
    """Return the number of tokens that a layer of a tower outputs per image, before any is dropped.

    Raises UserError if the layer has no such output.
    """
    from transformers import AutoModel
    from transformers.modeling_utils import set_zero3_state

    with torch.device("meta"), set_zero3_state():  # ZeRO-3 must not shard this model
        tower = AutoModel.from_config(config)
        try:
            out = tower(torch.empty(1, 3, config.image_size, config.image_size), output_hidden_states=True)
            _, tokens, _ = out.hidden_states[layer].shape
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{config.model_type} is not usable as a vision tower with layer {layer}: {error}",
                code="vision-tower-unusable",
                hint="expected:  an encoder with hidden states (batch, tokens, channels), or timm/NAME",
            ) from None
    return int(tokens)


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
