"""A random LLaVA-1.6 (`llava_next`): tiles of 32 pixels and 4 x 4 tokens, in grids of 1 x 2 to 3 x 1 of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from milora_vl.models.tiny import tiny_llava

GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def tiny_next(seed: int = 0) -> tuple[Any, Any]:
    """Return model and processor, as Hugging Face makes them."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor

    llava, small = tiny_llava(seed)
    own: Any = llava.config
    config: Any = LlavaNextConfig(
        vision_config=own.vision_config,
        text_config=own.text_config,
        image_token_index=own.image_token_id,
        image_grid_pinpoints=GRIDS,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=GRIDS
        ),
        tokenizer=small.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config)
    return model.eval(), processor


def saved(folder: Path) -> Path:
    """Write it as an HF folder; returns the folder."""
    model, processor = tiny_next()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
