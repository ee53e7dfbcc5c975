"""How many tokens a picture takes in a model, and which token stands for them."""

from __future__ import annotations

from typing import Any

import torch

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
    return count_tokens(vision, config.vision_feature_layer) - _patches(config)


def _patches(config: Any) -> int:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size if "patch_size" in dir(vision) else vision.grid
    return int(side * side)


def count_tokens(config: Any, layer: int) -> int:
    """Tokens that a layer of a tower gives for one picture, before any is dropped. UserError where it gives none."""
    from transformers import AutoModel
    from transformers.modeling_utils import set_zero3_state

    with torch.device("meta"), set_zero3_state():  # ZeRO-3 has nothing to cut up here
        tower = AutoModel.from_config(config)
        try:
            out = tower(torch.empty(1, 3, config.image_size, config.image_size), output_hidden_states=True)
            features = out.hidden_states[layer]
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{config.model_type} cannot serve as a vision tower with layer {layer}: {error}\n"
                "expected:  an encoder that gives hidden states (batch, tokens, channels), or timm/NAME"
            ) from None
    if features.dim() != 3:
        raise UserError(f"{config.model_type} gives features of shape {tuple(features.shape)}: take it from timm")
    return int(features.shape[1])
