"""Load any named model, config or processor: Hugging Face's or LLaVA's layout; models without weights (meta).

Every model without a timm tower (`smol-llava` has one) also loads without this package.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milora_vl.compat.transformers import whole_weights
from milora_vl.models import hub, original, parts
from milora_vl.models.names import MADE_IN_MEMORY
from milora_vl.models.quantized import Quantization

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def load_weights(
    name_or_path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    quantization: Quantization | BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Return a model without its processor, in `dtype` or the dtype it was saved in.

    Raises UserError for an unknown name, a model that is not available, and a folder without a model.
    """
    return hub.load_weights(in_hf_layout(name_or_path), dtype, quantization=quantization, device=device)


def load_processor(name: str | Path) -> Any:
    """Return the processor of a model, or the tokenizer of a text-only model, without loading weights.

    Raises UserError for an unknown name and a processor that is not available.
    """
    return hub.load_processor(in_hf_layout(name))


def config_of(name: str) -> Any:
    """Return the HF config of a named model, a folder or a hub id. Packaged configs need no network."""
    if original.is_original(Path(name)):
        return parts.planned_config(parts.parts_of_original(Path(name)))
    return hub.config_of(name)


def meta_model(config: Any) -> nn.Module:
    """Return the model of a config on the meta device, which allocates no memory."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    has_images = "vision_config" in config.to_dict()
    with whole_weights(), torch.device("meta"):
        return (AutoModelForImageTextToText if has_images else AutoModelForCausalLM).from_config(config)


def prepare(name: str) -> None:
    """Write the folder of a model that is built at first use: smol-llava, or one in LLaVA's original layout.

    Raises UserError for an unknown name, and if the folder cannot be written.
    """
    if name not in MADE_IN_MEMORY:
        hub.source_of(in_hf_layout(name))


def weights_folder(name: str) -> Path | None:
    """Return the folder with a model's files, downloaded if needed; None for models in memory.

    Raises UserError for an unknown name and a model that is not available.
    """
    return hub.weights_folder(in_hf_layout(name))


def in_hf_layout(name: str | Path) -> str:
    """Return the name, or the converted (cached) folder of a model in LLaVA's original layout."""
    folder = Path(name)
    if not original.is_original(folder):
        return str(name)
    converted, is_new = parts.base_folder(parts.parts_of_original(folder))
    if is_new:
        sys.stderr.write(f"converted {folder} from LLaVA's original layout to Hugging Face's: {converted}\n")
    return str(converted)


def split_processor(processor: Any) -> tuple[Any, Any | None]:
    """Return (tokenizer, image processor); the second is None for a text-only model."""
    from transformers import ProcessorMixin

    if isinstance(processor, ProcessorMixin):
        return processor.tokenizer, processor.image_processor
    return processor, None
