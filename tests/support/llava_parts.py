"""A small Vicuna and CLIP as folders for LLaVA's own code."""

from __future__ import annotations

from pathlib import Path

import torch

from support.llava_oracle import llama_tokenizer


def small_vicuna_and_clip(root: Path) -> None:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionModel

    from milora_vl.models.tiny import tiny_llava

    torch.manual_seed(0)
    CLIPVisionModel(tiny_llava()[0].config.vision_config).save_pretrained(root / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(root / "clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlavaLlamaForCausalLM(LlavaConfig(vocab_size=32000, **sizes)).save_pretrained(root / "vicuna")
    llama_tokenizer("legacy").save_pretrained(root / "vicuna")
