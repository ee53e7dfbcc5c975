"""A LLaVA with a timm tower, as code inside an exported model folder (`export --remote_code`).

`AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)` loads it without this package.
Only the config class is new: transformers renames LLaVA's weights when it loads them, but not for a new model class.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
)

from .timm_tower import TimmTowerConfig, register

_MODELS: list[tuple[Any, Any]] = [
    (MODEL_MAPPING, LlavaModel),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, LlavaForConditionalGeneration),
    (MODEL_FOR_MULTIMODAL_LM_MAPPING, LlavaForConditionalGeneration),  # `transformers serve` loads from it
]


class TimmLlavaConfig(LlavaConfig):
    """LLaVA's config; it registers the tower with transformers before reading the vision config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if TimmTowerConfig.model_type not in CONFIG_MAPPING:  # otherwise milora_vl has registered its tower
            register()
        for mapping, model in _MODELS:
            mapping.register(TimmLlavaConfig, model, exist_ok=True)
        super().__init__(*args, **kwargs)
