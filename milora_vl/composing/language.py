"""The language model of a LLaVA: any causal LM whose head is a plain matrix on its last hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from milora_data.errors import UserError
from milora_vl.composing import original


def load_language(name: str) -> tuple[Any, Any]:
    """Load a causal LM in the dtype it was saved in, and its tokenizer. UserError where it cannot be a LLaVA's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from milora_vl import models

    if original.is_original(Path(name)):
        config = original.read_original(Path(name)).text_config()
        language: Any = models.read_pretrained(AutoModelForCausalLM, name, config=config, dtype="auto")
        tokenizer = models.read_pretrained(AutoTokenizer, name)
    else:
        language, tokenizer = models.load_weights(name), models.load_processor(name)
    if "vision_config" in language.config.to_dict():
        raise UserError(f"{name} is a vision-language model already; a LLaVA is composed of a text-only one")
    require_plain_head(language, name)
    return language.eval(), tokenizer


def require_plain_head(language: Any, name: str) -> None:
    """HF's LLaVA takes head(hidden) for the logits: refuse a model that caps or scales them, or has a bias there."""
    ids = torch.arange(1, 9)[None].to(language.device)
    with torch.no_grad():
        own = language(input_ids=ids).logits
        plain = torch.nn.functional.linear(
            language.base_model(input_ids=ids)[0], language.get_output_embeddings().weight
        )
    if not torch.allclose(own.float(), plain.float(), rtol=2e-2, atol=2e-2 * float(own.abs().max())):
        raise UserError(
            f"{name}: its logits are not its head times its last hidden states (a cap, a scale, a bias)\n"
            "Hugging Face's LLaVA has no place for that, so the model would be another one"
        )
