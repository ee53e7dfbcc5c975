"""Pad rows of tokens to one length, or pack records into rows of a fixed length (`data.packing`).

`pack` chooses the records of a row, so that nearly every position of a step is a real token; `PackedRecords` is the
data set of such rows. Attention does not cross records, and transformers does the separation: without an attention mask
it finds the records of a row in the positions. Where they do not grow by one, a new record begins. It builds the block
mask of sdpa, eager and flex attention from that, and the sequence borders of flash attention.

`Row` and its functions make the tensors of `ImageTextCollator`; `RowPacker` packs what a model's own processor returns.
Pictures are not touched: a model puts their features at the positions of their tokens in order, row after row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from inspect import signature
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from milora_data.encode.tokens import IGNORE
from milora_data.records.record import Record
from milora_vl.common.errors import UserError

POOL = 8192  # records that are packed together
# Families whose packed rows a test compares with their records.
PACKED = frozenset(
    "aria aya_vision cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_vl deepseek_vl_hybrid "
    "exaone4_5 fast_vlm gemma3 gemma4 glm46v glm4v glm4v_moe glm_ocr glmga granite4_vision granite_docling "
    "hyperclovax_vision_v2 idefics3 internvl janus kimi_k25 lighton_ocr llava llava_next_video llava_onevision "
    "mistral3 muse_glimmer muse_spark ovis2 paddleocr_vl paligemma qianfan_ocr qwen2_5_vl qwen2_vl qwen3_vl "
    "qwen3_vl_moe smolvlm step3p7 video_llama_3 video_llava vipllava".split()
)
# The mask of their sliding window takes a token's position for its index in the row, when it looks up which tokens
# belong to a picture.
_POSITION_IS_INDEX = ("gemma3", "gemma4")
# Their positions need the tokens of each picture within the attention mask. No earlier token attends to later ones.
_COUNTS_SEEN = ("hunyuan_vl",)
_REASONS = {
    "mllama": "a text before its picture attends to all pictures of the row, also of other records",
}
_SEPARATED = {"full_attention", "sliding_attention", "chunked_attention"}  # layers, by what transformers calls them
_PADDED = ("input_ids", "attention_mask", "labels")
_TYPES = ("token_type_ids", "mm_token_type_ids")
_OF_ROPE = "input_ids attention_mask mm_token_type_ids image_grid_thw video_grid_thw second_per_grid_ts".split()


def pack(lengths: Sequence[int], capacity: int, seed: int = 0) -> list[list[int]]:
    """Return rows of indices whose lengths sum to at most `capacity`; each index is in exactly one row.

    Records are shuffled and packed pool by pool. A row starts with the longest remaining record; the next ones divide
    the free space evenly, and the last one is the longest that fits. Plain first-fit decreasing leaves 5 to 13 % of the
    positions empty: with pictures, all records have about the same length, so four fit and the rest stays empty.
    A record longer than `capacity` counts as `capacity`, because encoding cuts it.

    >>> [sorted(row) for row in pack([5, 3, 4, 2, 6], capacity=10)]
    [[2, 4], [0, 1, 3]]
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    sizes = np.minimum(np.asarray(lengths, dtype=np.int64), capacity)
    rows: list[list[int]] = []
    for start in range(0, len(order), POOL):
        pool = order[start : start + POOL]
        pool = pool[np.argsort(sizes[pool], kind="stable")]
        rows += _fitted(pool.tolist(), sizes[pool].tolist(), capacity)
    return rows


def _fitted(indices: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Return rows of `indices`, which are sorted by their `sizes`; both lists are emptied."""
    rows = []
    total = sum(sizes)
    while indices:
        row, space, index = [], capacity, len(indices) - 1
        while indices and index >= 0:
            row.append(indices.pop(index))
            size = sizes.pop(index)
            total -= size
            space -= size
            more = max(1, space * len(sizes) // total) if total else 1  # average number of records that still fit
            index = bisect_right(sizes, space // more) - 1
            if index < 0 and sizes and sizes[0] <= space:
                index = 0
        rows.append(row)
    return rows


def fill(rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> float:
    """Return the fraction of positions of all rows that contain a token.

    >>> fill([[0, 1], [2]], [5, 3, 4], capacity=10)
    0.6
    """
    return sum(min(lengths[index], capacity) for row in rows for index in row) / max(len(rows) * capacity, 1)


class PackedRecords(Dataset[list[Record]]):
    """A data set of rows, lists of records: two arrays, which loader processes share as they share no lists."""

    def __init__(self, records: Sequence[Record], rows: Sequence[Sequence[int]]) -> None:
        self.records = records
        self._indices = np.fromiter((index for row in rows for index in row), dtype=np.int64)
        self._ends = np.cumsum([len(row) for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> list[Record]:
        return [self.records[index] for index in self.indices(number)]

    def indices(self, number: int) -> list[int]:
        start = 0 if number == 0 else self._ends[number - 1]
        indices: list[int] = self._indices[start : self._ends[number]].tolist()
        return indices


class Row(NamedTuple):
    """Ids and labels of one row. `lengths` are the lengths of its records; later tokens are masked from attention.

    `images` are the pictures of its records in order, as `PixelMaker` takes them.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]
    images: Sequence[Any] = ()


def joined(rows: Sequence[Row]) -> Row:
    """Return one row with the records of all `rows`. The first token of each record has no context and is masked.

    >>> joined([Row([5, 6], [-100, 6], [2]), Row([7, 8], [7, 8], [2])])[:3]
    ([5, 6, 7, 8], [-100, 6, -100, 8], [2, 2])
    """
    return Row(
        [token for row in rows for token in row.input_ids],
        [label for row in rows for label in (IGNORE, *row.labels[1:])],
        [length for row in rows for length in row.lengths],
        [image for row in rows for image in row.images],
    )


def padded(rows: Sequence[Row], pad_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels (rows, length), padded on the right; the mask follows `lengths`.

    >>> batch = padded([Row([1, 5, 6], [-100, -100, 6], [3]), Row([1, 7], [-100, 7], [2])], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
    ([[1, 5, 6], [1, 7, 0]], [[1, 1, 1], [1, 1, 0]], [[-100, -100, 6], [-100, 7, -100]])
    """
    input_ids, labels = _tensors(rows, pad_id, multiple)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        attention_mask[number, : sum(row.lengths)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def packed(rows: Sequence[Row], pad_id: int, multiple: int = 1) -> dict[str, Any]:
    """Return input_ids, position_ids, labels (rows, length) and use_cache: positions start at 0 with each record.

    Without attention mask and cache, transformers detects packed records from the positions and separates them: by a
    block mask with sdpa and eager, and as separate sequences with flash attention, which needs all of them in one row.

    >>> packed([Row([1, 5, 1, 6, 7], [-100, 5, -100, 6, 7], [2, 3])], pad_id=0)["position_ids"].tolist()
    [[0, 1, 0, 1, 2]]
    """
    input_ids, labels = _tensors(rows, pad_id, multiple)
    position_ids = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        padding = input_ids.shape[1] - sum(row.lengths)
        lengths = [*row.lengths, padding] if padding else row.lengths
        position_ids[number] = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "use_cache": False}


def packed_flat(row: Row, pad_id: int, multiple: int = 1) -> dict[str, Any]:
    """Return `packed` of one row, with the borders of its records, as flash attention takes them.

    Without these arguments transformers reads them from `position_ids`, on the GPU and in each layer. They are for text
    models: LLaVA passes them on to its vision tower too, whose sequences have other borders.

    >>> batch = packed_flat(Row([1, 5, 1, 6, 7], [-100, 5, -100, 6, 7], [2, 3]), pad_id=0)
    >>> batch["cu_seq_lens_q"].tolist(), batch["max_length_q"]
    ([0, 2, 5], 3)
    """
    batch = packed([row], pad_id, multiple)
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
    borders = torch.cat([starts, starts.new_tensor([batch["input_ids"].shape[1]])]).int()
    longest = int(borders.diff().max())
    return {
        **batch,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _tensors(rows: Sequence[Row], pad_id: int, multiple: int) -> tuple[Tensor, Tensor]:
    longest = max(len(row.input_ids) for row in rows)
    width = -(-longest // multiple) * multiple
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.input_ids)] = _tensor(row.input_ids)
        labels[number, : len(row.labels)] = _tensor(row.labels)
    return input_ids, labels


def _tensor(numbers: list[int]) -> Tensor:
    """Return an int64 tensor; numpy with an explicit type is four times as fast as `torch.tensor` for a list."""
    return torch.from_numpy(np.fromiter(numbers, np.int64, len(numbers)))


def require_packable(config: Any) -> None:
    """Raise `UserError` with the reason if records cannot share a row of the model (any model) with this config."""
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


def with_hidden_picture(
    batch: Mapping[str, Any],
    picture: Mapping[str, Any],
    pad_id: int,
    multiple: int | None,
    model_type: str | None,
    beside: int = 0,
) -> dict[str, Any]:
    """Return a batch, padded or packed, with the picture, or the video, of a batch of one row.

    Its tokens follow the shortest text, and `beside` tokens of another hidden one; they are hidden from attention and
    from the loss. In packed rows they have the position of padding, 0, and so each is a separate record.
    """
    rows, width = batch["input_ids"].shape
    per_token = {name for name in picture if picture[name].shape == picture["input_ids"].shape}
    mask = batch.get("attention_mask")
    ends = torch.full((rows,), width) if mask is None else mask.sum(1)
    row, start = int(ends.argmin()), int(ends.min()) + beside
    stop = start + picture["input_ids"].shape[1]
    longest = max(width, stop)
    longest = longest if multiple is None else -(-longest // multiple) * multiple
    fills = {"input_ids": pad_id, "labels": IGNORE}
    texts = {name: batch[name] for name in (*_PADDED, "position_ids") if name in batch}
    texts |= {name: batch.get(name, torch.zeros_like(batch["input_ids"])) for name in per_token - {"attention_mask"}}
    texts = {name: F.pad(value, (0, longest - width), value=fills.get(name, 0)) for name, value in texts.items()}
    for name in per_token - ({"attention_mask"} if model_type not in _COUNTS_SEEN else set()):
        texts[name][row, start:stop] = picture[name][0]
    return {**batch, **{name: value for name, value in picture.items() if name not in per_token}, **texts}


class RowPacker:
    """Packs batches of one (packable) model; with `layout` "flat" all rows become one, for flash attention."""

    def __init__(self, config: Any, layout: Literal["rows", "flat"]) -> None:
        require_packable(config)
        self.layout = layout
        self._by_index = config.model_type in _POSITION_IS_INDEX
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
        gap = int(self._by_index)  # a separator, whose position is not the next one
        longest = max(sum(lengths[record] + gap for record in row) for row in members)
        width = longest if multiple is None else -(-longest // multiple) * multiple

        def packed(tensor: Tensor, fill: int = 0) -> Tensor:
            out = tensor.new_full((*tensor.shape[:-2], len(members), width), fill)
            for number, row in enumerate(members):
                parts = [F.pad(tensor[..., record, : lengths[record]], (0, gap), value=fill) for record in row]
                joined = torch.cat(parts, dim=-1)
                out[..., number, : joined.shape[-1]] = joined
            return out

        labels = batch["labels"].clone()
        labels[:, 0] = IGNORE  # the first token of a record has no context
        if self._by_index:  # rotary embeddings depend on differences alone: a record may begin anywhere
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
