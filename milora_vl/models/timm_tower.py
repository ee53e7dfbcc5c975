"""A timm encoder as the vision tower of a LLaVA: forward pass, pooling to a grid, normalization.

timm outputs feature maps (NCHW, or tokens after prefix tokens); LLaVA expects (batch, tokens, channels). The tower
pools the maps to a grid, normalizes every level and concatenates the levels. The import is relative because
`export --remote_code` copies this file into models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .timm_tower_config import TimmTowerConfig, register_config

__all__ = ["TimmTower", "TimmTowerConfig", "as_map", "register"]


class TimmTower(PreTrainedModel):
    """The encoder with pooled, normalized features: pixel_values (batch, 3, S, S) -> (batch, grid², hidden_size)."""

    config_class = TimmTowerConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    # timm selects its attention itself, so every attention implementation of the language model is supported. The names
    # are private in transformers; they stand here because this file is copied (tests/common/compat).
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: TimmTowerConfig) -> None:
        import timm

        super().__init__(config)
        self.encoder: Any = timm.create_model(config.architecture, pretrained=False, num_classes=0)
        self.post_init()

    def train(self, mode: bool = True) -> TimmTower:
        """Switch to training mode only if a weight trains: a frozen tower must not update its batch statistics."""
        weights: Any = self.parameters()
        return super().train(mode and any(weight.requires_grad for weight in weights))

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | Sequence[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: object,  # LlavaModel passes its keyword arguments on
    ) -> BaseModelOutput:
        """Return the features as `last_hidden_state` and as the only entry of `hidden_states`."""
        pixel_values = pixel_values.to(next(self.parameters()).dtype)  # as transformers' own towers do
        levels = list(self.config.levels)
        if levels:
            final, maps = self.encoder.forward_intermediates(pixel_values, indices=levels)
        else:
            final, maps = self.encoder.forward_features(pixel_values), []
        levels_of_maps = (*maps, as_map(self.encoder, final))
        features = torch.cat([self._tokens(level) for level in levels_of_maps], dim=-1)
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))

    def _tokens(self, features: Tensor) -> Tensor:
        """Return one level as (batch, grid², channels); each token is normalized so that no level dominates."""
        pooled = nn.functional.adaptive_avg_pool2d(features, self.config.grid).flatten(2).transpose(1, 2)
        return nn.functional.layer_norm(pooled, pooled.shape[-1:])


def as_map(encoder: Any, features: Tensor) -> Tensor:
    """Return the output of a timm encoder as (batch, channels, side, side).

    The input may also be channels-last (Swin) or (batch, prefix + side², channels). Raises ValueError for other shapes.
    """
    channels = encoder.num_features
    if features.dim() == 3 and features.shape[-1] == channels:
        side = math.isqrt(features.shape[1])
        prefix = features.shape[1] - side**2  # class and register tokens
        if prefix <= side:
            return features[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    if features.dim() == 4 and features.shape[1] != channels and features.shape[3] == channels:
        features = features.permute(0, 3, 1, 2)
    if features.dim() == 4 and features.shape[1] == channels and features.shape[2] == features.shape[3]:
        return features
    raise ValueError(f"features of shape {tuple(features.shape)}, not a square map of {channels:,} channels")


def register() -> None:
    """Register the tower and its config with transformers' Auto classes; a second call does nothing."""
    from transformers import AutoModel  # not at the top, as in `register_config`

    register_config()
    AutoModel.register(TimmTowerConfig, TimmTower, exist_ok=True)
