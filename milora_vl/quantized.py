"""Quantised bases: bitsandbytes' settings, as LLaVA's `--bits 4|8` has them.

Factors are taken from the dequantised weight, and the anchored form leaves the base alone: step 0 equals the quantised
base, whatever that has lost.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

Quantization = Literal["4bit", "8bit"]
# Kept as they are, as in LLaVA: a projector that trains, the tower, and the head.
_PARTS = ("multi_modal_projector", "vision_tower")
UNQUANTIZED = ("lm_head", *_PARTS, *(f"model.{part}" for part in _PARTS))  # transformers compares from the path's start


def quantization_config(quantization: Quantization) -> Any:
    """Return the BitsAndBytesConfig of a quantised base: NF4 with double quantisation, or 8 bits."""
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTIZED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(UNQUANTIZED),
    )
