"""What the configs of `family_configs.py` are made of: sizes, and the form of an entry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY, IMAGE = 64, 60
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
CLIP, SIGLIP = {"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}


@dataclass(frozen=True)
class Family:
    """How to build one family. `tokens`: image tokens of its one picture; `pixels`: the picture's shape, None for none.

    `language`: what the paths of the language layers start with; `projector`: what those of the projector hold.
    """

    model_type: str
    tokens: int
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    pixels: tuple[int, ...] | None = (1, 3, 16, 16)
    inputs: dict[str, Any] = field(default_factory=dict)
    language: str = "model.language_model.layers."
    projector: str = "multi_modal_projector"


def grid(pixels: int) -> dict[str, Any]:
    """Return the fields of a family whose picture comes as four patches of so many numbers."""
    kinds = [[int(position == 2) for position in range(20)]]
    return {"pixels": (4, pixels), "inputs": {"image_grid_thw": [[1, 2, 2]], "mm_token_type_ids": kinds}}
