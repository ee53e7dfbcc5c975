"""Pack what a model's own processor returns: several records in one row, which attention does not cross.

transformers does the separation. Without an attention mask it finds the records of a row in the positions: where they
do not grow by one, a new record begins. It builds the block mask of sdpa, eager and flex attention from that, and the
sequence borders of flash attention. Pictures are not touched: a model puts their features into the places of their
tokens in order, row after row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milora_data.encode.tokens import IGNORE
from milora_vl.common.errors import UserError

# Families whose packed rows a test compares with their records.
PACKED = frozenset(
    "aria aya_vision cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_vl deepseek_vl_hybrid "
    "exaone4_5 fast_vlm gemma3 gemma4 glm46v glm4v glm4v_moe glm_ocr glmga granite4_vision granite_docling "
    "hyperclovax_vision_v2 idefics3 internvl janus kimi_k25 lighton_ocr llava llava_next_video llava_onevision "
    "mistral3 muse_glimmer muse_spark ovis2 paddleocr_vl paligemma qianfan_ocr qwen2_5_vl qwen2_vl qwen3_vl "
    "qwen3_vl_moe smolvlm step3p7 video_llama_3 video_llava vipllava".split()
)
# The mask of their sliding window takes a token's position for its place in the row, when it looks up which tokens
# belong to a picture.
_PLACES = ("gemma3", "gemma4")
_REASONS = {
    "mllama": "a text before its picture attends to all pictures of the row, also of other records",
}
_SEPARATED = {"full_attention", "sliding_attention", "chunked_attention"}  # layers, by what transformers calls them
_PADDED = ("input_ids", "attention_mask", "labels")
_TYPES = ("token_type_ids", "mm_token_type_ids")
_OF_ROPE = "input_ids attention_mask mm_token_type_ids image_grid_thw video_grid_thw second_per_grid_ts".split()


def require_packable(config: Any) -> None:
    """Raise `UserError` with the reason if records cannot share a row of the model with this config.

    The model may also be a text model or a LLaVA, whose collator is another one.
    """
    from transformers import MODEL_MAPPING

    text, reason = config.get_text_config(), ""
    others = set(getattr(text, "layer_types", None) or ()) - _SEPARATED  # some configs have another name for it
    kind: Any = MODEL_MAPPING.get(type(text), None)
    if others:
        reason = f"only attention separates them, and it has layers of type {min(others)}"
    elif kind is not None and "position_ids" not in signature(kind.forward).parameters:
        reason = "it takes no positions, which separate the records"
    elif "vision_config" in config.to_dict() and config.model_type not in (*PACKED, "llava_next"):
        reason = _REASONS.get(config.model_type, "no test compares packed rows of this family with its records")
    if reason:
        raise UserError(
            f"records of {config.model_type} cannot share a row: {reason}",
            code="packing-unsupported-model",
            hint="use --group_by_length True to reduce padding",
        )


class RowPacker:
    """Packs batches of one model. Raises `UserError` if the model cannot take packed records.

    With `layout` "flat" all rows become one, which flash attention needs.
    """

    def __init__(self, config: Any, layout: Literal["rows", "flat"]) -> None:
        require_packable(config)
        self.layout = layout
        self._by_place = config.model_type in _PLACES
        self._model = _without_layers(config)

    def __call__(
        self, batch: Mapping[str, Any], rows: Sequence[int], *, pad_id: int, multiple: int | None
    ) -> dict[str, Any]:
        """Return the batch with its records packed: record i, padded on the right, goes to the row with number rows[i].

        `rows` does not decrease. What has a number per token becomes (rows, width); position_ids, (rows, width) or
        (4, rows, width), and use_cache replace attention_mask. Everything else, pictures above all, is unchanged.
        """
        lengths = batch["attention_mask"].sum(1).tolist()
        numbers = [0] * len(rows) if self.layout == "flat" else rows
        members = [[record for record, _ in group] for _, group in groupby(enumerate(numbers), itemgetter(1))]
        gap = int(self._by_place)  # a separator, whose position is not the next one
        longest = max(sum(lengths[record] + gap for record in row) for row in members)
        width = longest if multiple is None else -(-longest // multiple) * multiple

        def packed(tensor: Tensor, fill: int = 0) -> Tensor:
            """Return a tensor (..., records, length) as (..., rows, width)."""
            out = tensor.new_full((*tensor.shape[:-2], len(members), width), fill)
            for number, row in enumerate(members):
                parts = [F.pad(tensor[..., record, : lengths[record]], (0, gap), value=fill) for record in row]
                joined = torch.cat(parts, dim=-1)
                out[..., number, : joined.shape[-1]] = joined
            return out

        labels = batch["labels"].clone()
        labels[:, 0] = IGNORE  # the first token of a record has no context
        if self._by_place:  # rotary embeddings depend on differences alone: a record may begin anywhere
            positions = torch.arange(width) * packed(batch["attention_mask"])
        else:
            positions = packed(self._positions(batch))
        return {
            "input_ids": packed(batch["input_ids"], pad_id),
            "position_ids": positions,
            "labels": packed(labels, IGNORE),
            "use_cache": False,  # with a cache, transformers separates no records
            **{name: packed(batch[name]) for name in _TYPES if name in batch},
            **{name: value for name, value in batch.items() if name not in (*_PADDED, *_TYPES)},
        }

    def _positions(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the positions of each record: from 0 on, (records, length).

        For a model with rotary embeddings in three dimensions (4, records, length): it takes the masks from the first
        row, and computes the others, which follow the pictures.
        """
        restarting = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        if "get_rope_index" not in dir(self._model):
            return restarting
        mine, _ = self._model.get_rope_index(**{name: batch[name] for name in _OF_ROPE if name in batch})
        return torch.cat([restarting[None], mine])


def _without_layers(config: Any) -> Any:
    """Return the model of a config without its layers, as light as its config: `get_rope_index` needs no more."""
    from transformers import MODEL_MAPPING

    kind: Any = MODEL_MAPPING[type(config)]
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = config
    return model
