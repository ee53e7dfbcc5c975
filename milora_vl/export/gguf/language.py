"""The language model of a GGUF file: architecture, rotary settings and tensors, with the names and orders of llama.cpp.

The names follow the table of the package gguf. In the architecture `llama`, rotary positions act on neighbouring rows
of q and k; transformers pairs rows of the first and second half, so the rows are permuted (convert_hf_to_gguf.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from milora_vl.base.errors import UserError
from milora_vl.export.gguf.files import renamed

if TYPE_CHECKING:
    from gguf import GGUFWriter

# model_type of transformers -> architecture of llama.cpp. Each is compared with llama.cpp by tests/export/test_gguf.py.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PERMUTED = ("llama",)


@dataclass(frozen=True, slots=True)
class Language:
    """The language part of a HF config, and the architecture that it has in llama.cpp."""

    config: Any
    architecture: str

    @property
    def head_dim(self) -> int:
        """Return the number of columns of one attention head."""
        return int(self.config.to_dict().get("head_dim") or self.config.hidden_size // self.config.num_attention_heads)

    def name_of(self, name: str) -> str | None:
        """Return the name in GGUF of a weight `model.layers.0.self_attn.q_proj.weight`; None if it has none."""
        table = _table(self.architecture, self.config.num_hidden_layers)
        found: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def ordered(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of a weight (out, ...) in llama.cpp's order."""
        if self.architecture not in _PERMUTED:
            return rows
        heads = {
            "self_attn.q_proj": self.config.num_attention_heads,
            "self_attn.k_proj": self.config.num_key_value_heads,
        }
        count = next((number for part, number in heads.items() if part in name), None)
        if count is None:
            return rows
        halves = rows.reshape(count, 2, rows.shape[0] // count // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)


def language_of(config: Any) -> Language:
    """Return the language part of a model's config. Raises UserError if it was not compared with llama.cpp."""
    text = config.get_text_config()
    kind = text.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"this export writes {', '.join(ARCHITECTURES)}; the language model of this base is {kind}",
            code="export-gguf-model",
            where="--to",
            hint="use --to merged, then convert_hf_to_gguf.py of llama.cpp",
        )
    return Language(text, ARCHITECTURES[kind])


def add_settings(writer: GGUFWriter, language: Language) -> None:
    """Write the sizes of the language model. Raises UserError for rotary positions that llama.cpp reads otherwise."""
    config = language.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(language.head_dim)
    writer.add_value_length(language.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(language.head_dim)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    values = config.to_dict()
    window = values.get("sliding_window")
    if window and values.get("use_sliding_window", True) and window < config.max_position_embeddings:
        sys.stderr.write(f"note: llama.cpp attends to all positions; the model, to the last {window:,}\n")


def _rope(config: Any) -> Mapping[str, Any]:
    """Return the settings of the rotary positions. transformers 4 has two keys for what is one mapping since 5."""
    values = config.to_dict()
    rope = {"rope_theta": values.get("rope_theta") or 10000.0}
    rope |= values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(
            f"this export does not write rotary positions of type {rope['rope_type']}",
            code="export-gguf-model",
            where="--to",
            hint="use --to merged, then convert_hf_to_gguf.py of llama.cpp",
        )
    return rope


def tensors_of(language: Language, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by name in GGUF. `state` has the names of a text model (`model.layers...`, `lm_head`).

    Raises UserError for a weight that GGUF has no place for.
    """
    tied = language.config.tie_word_embeddings
    tensors = {}
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        known = language.name_of(name)
        if known is None:
            raise UserError(
                f"GGUF has no place for this weight in the architecture {language.architecture}",
                code="export-gguf-model",
                where=name,
                hint="use --to merged",
            )
        tensors[known] = language.ordered(name, tensor)
    factors = _llama3_factors(language)
    return tensors if factors is None else {"rope_freqs.weight": factors, **tensors}


def _llama3_factors(language: Language) -> Tensor | None:
    """Return what Llama 3 divides each frequency by (head_dim / 2), None for other positions."""
    rope, dim = _rope(language.config), language.head_dim
    if rope["rope_type"] != "llama3":
        return None
    waves = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2).double() / dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)  # 0: long waves, divided by the factor
    return (1 / ((1 - smooth) / factor + smooth)).float()


def text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the language weights of a model's state dict by their names in a text model.

    >>> list(text_state({"model.language_model.norm.weight": torch.ones(1), "model.vision_tower.a": torch.ones(1)}))
    ['model.norm.weight']
    """
    if not any(".language_model." in f".{name}" for name in state):
        return dict(state)
    return renamed(state, text_name)


def text_name(name: str) -> str | None:
    """Return the name in a text model of a weight of a vision-language model; None outside its language tower.

    >>> text_name("model.language_model.layers.0.mlp.up_proj"), text_name("lm_head.weight"), text_name("model.norm")
    ('model.layers.0.mlp.up_proj', 'lm_head.weight', None)
    """
    for prefix, instead in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
        ("lm_head.", "lm_head."),
    ):
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return None


@lru_cache
def _table(architecture: str, blocks: int) -> Any:
    """Return the table of names of an architecture with this number of blocks."""
    import gguf

    number = next(n for n, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    return gguf.get_tensor_name_map(number, blocks)
