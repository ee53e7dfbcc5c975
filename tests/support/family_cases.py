"""A tiny random model and one batch (text and a picture) for every model family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.family_configs import FAMILIES, TEXT_ONLY
from support.family_shapes import IMAGE, TEXT, VISION


def build(name: str) -> nn.Module:
    """Return the tiny random model of a family, in eval mode; equal for equal names."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        VideoLlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    if name in TEXT_ONLY:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**TEXT, **TEXT_ONLY[name]})).eval()
    family = FAMILIES[name]
    config = AutoConfig.for_model(
        family.model_type,
        text_config={**TEXT, **family.text},
        vision_config={**VISION, **(family.vision or {})},
        tie_word_embeddings=False,
        **family.config,
    )
    if name == "video_llava":  # transformers 4 has no auto class for it
        return VideoLlavaForConditionalGeneration(config).float().eval()
    return AutoModelForImageTextToText.from_config(config).float().eval()


def batch(name: str) -> dict[str, Tensor]:
    """Return one row: text, and a picture where the family's forward takes one without a processor."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (1, 20), generator=generator)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    family = FAMILIES.get(name)
    if family is None or family.pixels is None:
        return inputs
    ids[0, 2 : 2 + family.tokens] = IMAGE
    inputs["pixel_values"] = torch.randn(family.pixels, generator=generator)
    return inputs | {key: torch.tensor(value) for key, value in family.inputs.items()}
