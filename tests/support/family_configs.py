"""The smallest config of every model family that transformers can build, its tiny random model, and one batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
CLIP, SIGLIP = {"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}
LLAMA, MISTRAL, QWEN2 = {"model_type": "llama"}, {"model_type": "mistral"}, {"model_type": "qwen2"}


@dataclass(frozen=True)
class Family:
    """How to build one family. `tokens`: image tokens of its one picture; `pixels`: the picture's shape, None for none.

    `language`: what the paths of the language layers start with; `projector`: what the projector's hold.
    """

    tokens: int
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    pixels: tuple[int, ...] | None = (1, 3, 16, 16)
    inputs: dict[str, Any] = field(default_factory=dict)
    language: str = "model.language_model.layers."
    projector: str = "multi_modal_projector"


KINDS = {"mm_token_type_ids": [[int(position == 2) for position in range(20)]]}
# Four patches of 384 numbers; two tiles; a picture of a connector.
GRID: dict[str, Any] = {"pixels": (4, 384), "inputs": KINDS | {"image_grid_thw": [[1, 2, 2]]}, "projector": "merger"}
TILES: dict[str, Any] = {"pixels": (1, 2, 3, 16, 16), "inputs": {"image_sizes": [[16, 16]]}}
LISTS: dict[str, Any] = {"pixels": (1, 1, 3, 16, 16), "language": "model.text_model.layers.", "projector": "connector"}
IMAGE_ID, IMAGE_INDEX = {"image_token_id": IMAGE}, {"image_token_index": IMAGE}
VIDEO_ID = {"video_token_id": IMAGE + 1}
PINPOINTS = {"image_grid_pinpoints": [[16, 16]]}
PREFIX = {"token_type_ids": [[0] * 20]}  # transformers 5.6 asks for them when such a model trains
QWEN_IDS = IMAGE_ID | VIDEO_ID | {"vision_start_token_id": IMAGE + 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
POSITIONS = {"num_position_embeddings": 16}
MROPE = {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}}
QFORMER = VISION | {"num_hidden_layers": 1, "encoder_hidden_size": 12, "vocab_size": 30}
RESAMPLER = {"resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
FAMILIES: dict[str, Family] = {
    "llava": Family(4, LLAMA, CLIP, IMAGE_INDEX),
    "llava_next": Family(10, LLAMA, CLIP, IMAGE_INDEX | PINPOINTS, **TILES),
    "llava_onevision": Family(10, QWEN2, SIGLIP, IMAGE_ID | IMAGE_INDEX | VIDEO_ID | PINPOINTS, **TILES),
    "paligemma": Family(
        4, {"model_type": "gemma"}, SIGLIP, IMAGE_INDEX | {"projection_dim": 16, "hidden_size": 16}, inputs=PREFIX
    ),
    "gemma3": Family(
        4,
        {"model_type": "gemma3_text", "sliding_window": 16},
        SIGLIP,
        IMAGE_INDEX | {"mm_tokens_per_image": 4, "boi_token_index": IMAGE + 1, "eoi_token_index": IMAGE + 2},
        inputs=PREFIX,
    ),
    "internvl": Family(
        1,
        QWEN2,
        {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]},
        IMAGE_ID | {"downsample_ratio": 0.5},
    ),
    "mistral3": Family(
        4,
        MISTRAL,
        {"model_type": "pixtral", "head_dim": 6, "image_size": 32},
        IMAGE_INDEX | {"spatial_merge_size": 2},
        (1, 3, 32, 32),
        {"image_sizes": [[32, 32]]},
    ),
    "aya_vision": Family(1, {"model_type": "cohere2"}, SIGLIP, IMAGE_INDEX | {"downsample_factor": 2}),
    "mllama": Family(
        0,
        {"model_type": "mllama_text_model", "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}},
        {
            "model_type": "mllama_vision_model",
            "attention_heads": 2,
            "num_global_layers": 1,
            "max_num_tiles": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 24,
            "supported_aspect_ratios": [[1, 1]],
        },
        IMAGE_INDEX,
        None,
    ),
    "idefics2": Family(
        2,
        MISTRAL,
        {"model_type": "idefics2"},
        IMAGE_ID | {"perceiver_config": RESAMPLER | {"num_key_value_heads": 1}},
        **LISTS,
    ),
    "idefics3": Family(1, LLAMA, {"model_type": "idefics3_vision"}, IMAGE_ID | {"scale_factor": 2}, **LISTS),
    "smolvlm": Family(1, LLAMA, {"model_type": "smolvlm_vision"}, IMAGE_ID | {"scale_factor": 2}, **LISTS),
    "qwen2_vl": Family(1, MROPE, QWEN_VISION | {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}, QWEN_IDS, **GRID),
    "qwen2_5_vl": Family(
        1, MROPE, QWEN_VISION | SIZES | {"fullatt_block_indexes": [1], "window_size": 32}, QWEN_IDS, **GRID
    ),
    "qwen3_vl": Family(
        1,
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        QWEN_VISION | SIZES | POSITIONS | {"deepstack_visual_indexes": [0]},
        QWEN_IDS,
        **GRID,
    ),
    "qwen3_5": Family(
        1,
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 32,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1],
            },
        },
        QWEN_VISION | SIZES | POSITIONS,
        QWEN_IDS,
        **GRID,
    ),
    "gemma4": Family(
        1,
        {
            "model_type": "gemma4_text",
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
        },
        {
            "model_type": "gemma4_vision",
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        IMAGE_ID | VIDEO_ID | {"boi_token_id": IMAGE + 2, "eoi_token_id": IMAGE + 3},
        (1, 4, 192),
        KINDS | {"image_position_ids": [[[0, 0], [0, 1], [1, 0], [1, 1]]]},
        projector="embed_vision",
    ),
    "blip-2": Family(
        3,
        {"model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16},
        {},
        IMAGE_INDEX | {"qformer_config": QFORMER, "num_query_tokens": 3, "image_text_hidden_size": 8},
        language="language_model.model.decoder.layers.",
        projector="language_projection",
    ),
    "glm4v": Family(
        1,
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}, "partial_rotary_factor": 0.5},
        SIZES | {"depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 16},
        IMAGE_ID | VIDEO_ID | {"image_start_token_id": IMAGE + 2, "image_end_token_id": IMAGE + 3},
        **GRID,
    ),
}
TEXT_ONLY: dict[str, dict[str, Any]] = {
    **{name: {} for name in "llama mistral qwen2 qwen3 gemma gemma2 phi3 gpt_neox olmo2 smollm3".split()},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "mixtral": {"num_local_experts": 2},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


def build(name: str) -> nn.Module:
    """Return the tiny random model of a family, in eval mode; equal for equal names."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    if name in TEXT_ONLY:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**TEXT, **TEXT_ONLY[name]})).eval()
    family = FAMILIES[name]
    config = AutoConfig.for_model(
        name,
        text_config={**TEXT, **family.text},
        vision_config={**VISION, **(family.vision or {})},
        tie_word_embeddings=False,
        **family.config,
    )
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
