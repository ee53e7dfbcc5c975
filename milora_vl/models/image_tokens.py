"""The number of tokens of an image in a LLaVA, from the sizes of its tower; which models use their own processor."""

from __future__ import annotations

from typing import Any

import torch

from milora_data.pictures.pixels import Tiling
from milora_vl.common.errors import UserError

LLAVAS = ("llava", "llava_next")
# Common towers; the tokens of others are counted on the meta device.
EXTRA_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "milora_timm_tower": 0}


def is_llava(config: Any) -> bool:
    """Return whether the model is a LLaVA-1.5 or LLaVA-1.6, whose pictures take a number of tokens known here.

    Pixtral has the same model type, but the size of a picture decides how many tokens it takes.
    """
    return config.model_type in LLAVAS and config.vision_config.model_type != "pixtral"


def uses_processor(config: Any) -> bool:
    return "vision_config" in config.to_dict() and not is_llava(config)


def tiling_of(config: Any) -> Tiling | None:
    """Return how a LLaVA-1.6 model tiles images; None for models without tiles."""
    if config.model_type != "llava_next":
        return None
    vision = config.vision_config
    pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    return Tiling(pinpoints, vision.image_size, vision.image_size // vision.patch_size)


def image_token_id(config: Any) -> int:
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


def _patches(config: Any) -> int:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size if "patch_size" in dir(vision) else vision.grid
    return int(side * side)


def count_tokens(config: Any, layer: int) -> int:
    """Return the number of tokens that a layer of a tower outputs per image, before any is dropped."""
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
                hint="expected:  an encoder with hidden states (batch, tokens, channels), or timm/NAME",
            ) from None
    return int(tokens)
