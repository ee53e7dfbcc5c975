"""How many tokens a picture takes in a model, and which token stands for them."""

from __future__ import annotations

from typing import Any

from milora_data.anyres import Tiling
from milora_data.errors import UserError

LLAVAS = ("llava", "llava_next")
# Of the towers that are met most; others are counted on the meta device.
EXTRA_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "milora_timm_tower": 0}


def require_llava(config: Any) -> None:
    """Raise UserError for a model with pictures that takes them in another way than LLaVA-1.5 and LLaVA-1.6."""
    if config.model_type not in LLAVAS:
        raise UserError(
            f"pictures of a {config.model_type} model are not prepared here: only those of LLaVA-1.5 and LLaVA-1.6\n"
            "adapters go on it all the same: apply_milora, with batches and a trainer of your own\n"
            "see: docs/integrations.md"
        )


def tiling_of(config: Any) -> Tiling | None:
    """Return how a model of LLaVA-1.6 tiles pictures; None for models that see a picture once."""
    if config.model_type != "llava_next":
        return None
    vision = config.vision_config
    pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    return Tiling(pinpoints, vision.image_size, vision.image_size // vision.patch_size)


def image_token_id(config: Any) -> int:
    """Return the id of the token that stands for a picture in the prompt."""
    return int(config.image_token_id)


def image_tokens(config: Any) -> int:
    """Return how many tokens a picture takes, by the tower's own sizes; if it is tiled, one of 640 x 480 pixels.

    Raises UserError for a model that is no LLaVA.
    """
    require_llava(config)
    tiling = tiling_of(config)
    if tiling is not None:
        return tiling.num_tokens(480, 640)
    dropped = config.vision_feature_select_strategy == "default"
    return _patches(config) + extra_tokens(config) - int(dropped)


def extra_tokens(config: Any) -> int:
    """Return how many tokens the tower of a LLaVA gives beside those of its patches: class token, registers."""
    vision = config.vision_config
    if vision.model_type in EXTRA_TOKENS or config.model_type != "llava":
        return EXTRA_TOKENS.get(vision.model_type, 0)
    from milora_vl.composing.vision import count_tokens

    return count_tokens(vision, config.vision_feature_layer) - _patches(config)


def complete_processor(processor: Any, config: Any) -> None:
    """Set what the processor needs to count image tokens, and square padding, as LLaVA-1.5 was trained."""
    if config.model_type not in LLAVAS:
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
