"""A timm encoder as the vision tower of a LLaVA: forward pass, pooling to a grid, normalization.

timm outputs feature maps (NCHW, or tokens after prefix tokens); LLaVA expects (batch, tokens, channels). The tower
pools the maps to a grid, normalizes every level and concatenates the levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class TimmTowerConfig(PretrainedConfig):
    """The settings of a tower.

    architecture: timm's name; image_size: pixels per side; grid: tokens per side after pooling;
    levels: indices of timm's intermediate features, placed before the final ones; hidden_size: channels.
    """

    model_type = "milora_timm_tower"

    def __init__(
        self,
        architecture: str = "tf_efficientnet_lite0",
        image_size: int = 224,
        grid: int = 4,
        levels: Sequence[int] = (),
        hidden_size: int = 1280,
        **kwargs: Any,  # transformers passes all other keys of config.json
    ) -> None:
        self.architecture = architecture
        self.image_size = image_size
        self.grid = grid
        self.levels = list(levels)
        self.hidden_size = hidden_size
        super().__init__(**kwargs)

    @property
    def patch_size(self) -> int:
        return self.image_size // self.grid

    @classmethod
    def of(cls, architecture: str, *, image_size: int, grid: int, levels: Sequence[int] = ()) -> TimmTowerConfig:
        import timm

        if image_size % grid:
            raise ValueError(f"image_size {image_size} is not a multiple of grid {grid}")
        with torch.device("meta"):
            encoder: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
        channels = [level["num_chs"] for level in encoder.feature_info]
        hidden_size = sum(channels[level] for level in levels) + encoder.num_features
        return cls(architecture, image_size, grid, levels, hidden_size)


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

    def get_input_embeddings(self) -> nn.Module:
        """Raise NotImplementedError, for which `enable_input_require_grads` of transformers skips a module."""
        raise NotImplementedError("a network of timm has no input embeddings")

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
    AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig, exist_ok=True)
    AutoModel.register(TimmTowerConfig, TimmTower, exist_ok=True)
