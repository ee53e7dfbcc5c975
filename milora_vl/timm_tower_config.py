"""The config of a timm vision tower (`milora_vl.timm_tower`), importable without the tower's classes.

This file and the tower's are also copied into exported models (`--remote_code`), so they import nothing of this package
but each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class TimmTowerConfig(PretrainedConfig):
    """What a tower is made of.

    architecture: timm's name; image_size: pixels a side; grid: tokens a side after pooling;
    levels: indices into timm's intermediate features that are put in front of the final ones; hidden_size: channels.
    """

    model_type = "milora_timm_tower"

    def __init__(
        self,
        architecture: str = "tf_efficientnet_lite0",
        image_size: int = 224,
        grid: int = 4,
        levels: Sequence[int] = (),
        hidden_size: int = 1280,
        **kwargs: Any,  # transformers passes every other key of config.json through here
    ) -> None:
        self.architecture = architecture
        self.image_size = image_size
        self.grid = grid
        self.levels = list(levels)
        self.hidden_size = hidden_size
        super().__init__(**kwargs)

    @property
    def patch_size(self) -> int:
        """Pixels a side of one token, as LLaVA's processor counts them."""
        return self.image_size // self.grid

    @classmethod
    def of(cls, architecture: str, *, image_size: int, grid: int, levels: Sequence[int] = ()) -> TimmTowerConfig:
        """Return the config of a timm encoder, its channels counted on the meta device.

        Raises ValueError when the picture does not divide into the grid.
        """
        import timm
        import torch

        if image_size % grid:
            raise ValueError(f"image_size {image_size} is not a multiple of grid {grid}")
        with torch.device("meta"):
            encoder: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
        channels = [level["num_chs"] for level in encoder.feature_info]
        hidden_size = sum(channels[level] for level in levels) + encoder.num_features
        return cls(architecture, image_size, grid, levels, hidden_size)


def register_config() -> None:
    """Make the config known to transformers' AutoConfig; a second call does nothing."""
    # Not at the top: `milora_vl.auto_classes` imports this module when transformers' Auto classes are imported.
    from transformers import AutoConfig

    AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig, exist_ok=True)
