"""4-bit and 8-bit bases: bitsandbytes settings (LLaVA's `--bits 4|8`), and which layers stay unquantized.

Initial factors come from the dequantised weight, and an adapter does not change the base. So step 0 equals the
quantised base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.matrices import is_linear

Quantization = Literal["4bit", "8bit"]
QuantType = Literal["nf4", "fp4"]


def unquantized(model: nn.Module) -> tuple[str, ...]:
    """Return the starts of the paths that quantisation leaves out: head, projector and vision tower, as in LLaVA.

    transformers matches them from the start of a path.
    """
    roots = find_towers(model).roots
    return tuple(dict.fromkeys(["lm_head", *roots.get("projector", ()), *roots.get("vision", ())]))


def quantized_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers of a model that quantisation packs.

    >>> from milora_vl.models.tiny import tiny_llava
    >>> quantized_layers(tiny_llava()[0])[0]
    'model.language_model.layers.0.self_attn.q_proj'
    """
    kept = unquantized(model)
    return [path for path, module in model.named_modules() if is_linear(module) and not path.startswith(kept)]


def bytes_per_number(quantization: Quantization, *, double_quant: bool) -> float:
    """Return the bytes per packed weight; 4 bits add a constant per 64 numbers (4 bytes, or 1 byte if quantised).

    >>> round(bytes_per_number("4bit", double_quant=True), 3), bytes_per_number("4bit", double_quant=False)
    (0.516, 0.5625)
    """
    if quantization == "8bit":
        return 1.0
    return 0.5 + (1 + 4 / 256 if double_quant else 4) / 64


def quantization_config(
    quantization: Quantization,
    kept: Sequence[str],
    *,
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """Return the BitsAndBytesConfig of a quantised base. The keyword arguments apply to 4 bits (arXiv:2305.14314).

    `kept` is what `unquantized` returns for the model.

    The defaults are those in QLoRA and LLaVA: NF4 with double quantisation.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(kept))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(kept),
    )
