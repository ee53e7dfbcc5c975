"""Quantised bases: bitsandbytes' settings, as LLaVA's `--bits 4|8` has them.

Factors are taken from the dequantised weight, and the anchored form leaves the base alone: step 0 equals the quantised
base, whatever that has lost.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from milora_vl.weights.matrices import is_linear

Quantization = Literal["4bit", "8bit"]
QuantType = Literal["nf4", "fp4"]
# Kept as they are, as in LLaVA: a projector that trains, the tower, and the head.
_PARTS = ("multi_modal_projector", "vision_tower")
UNQUANTIZED = ("lm_head", *_PARTS, *(f"model.{part}" for part in _PARTS))  # transformers compares from the path's start


def is_quantized(path: str, module: nn.Module) -> bool:
    """Whether the layer at `path` of an unquantised model has few bits in a quantised one.

    >>> [is_quantized(path, nn.Linear(2, 2)) for path in ("model.language_model.layers.0.mlp.up_proj", "lm_head")]
    [True, False]
    """
    return is_linear(module) and not path.startswith(UNQUANTIZED)


def bytes_per_number(quantization: Quantization, *, double_quant: bool) -> float:
    """Memory of a packed weight: its bits, and in 4 bits a constant for each 64 numbers (4 bytes, or 1 and its own).

    >>> round(bytes_per_number("4bit", double_quant=True), 3), bytes_per_number("4bit", double_quant=False)
    (0.516, 0.5625)
    """
    if quantization == "8bit":
        return 1.0
    return 0.5 + (1 + 4 / 256 if double_quant else 4) / 64


def quantization_config(
    quantization: Quantization,
    *,
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """Return the BitsAndBytesConfig of a quantised base; all but the first are for 4 bits (arXiv:2305.14314).

    The defaults are QLoRA's own and LLaVA's: NF4, whose constants are quantised too.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTIZED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(UNQUANTIZED),
    )
