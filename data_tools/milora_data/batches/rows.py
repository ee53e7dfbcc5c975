"""Pad or pack rows of tokens into tensors: attention mask, position ids, padding side, LLaVA's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from milora_data.encode.labels import IGNORE


class Row(NamedTuple):
    """Ids and labels of one row. `lengths` are the lengths of its records; later tokens are masked from attention."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]


def joined(rows: Sequence[Row]) -> Row:
    """Return one row with the records of all `rows`. The first token of each record has no context and is masked.

    >>> joined([Row([5, 6], [-100, 6], [2]), Row([7, 8], [7, 8], [2])])
    Row(input_ids=[5, 6, 7, 8], labels=[-100, 6, -100, 8], lengths=[2, 2])
    """
    return Row(
        [token for row in rows for token in row.input_ids],
        [label for row in rows for label in (IGNORE, *row.labels[1:])],
        [length for row in rows for length in row.lengths],
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


def with_single_image_tokens(row: Row, image_token_id: int, image_tokens: int, llava_id: int) -> Row:
    """Return a row in LLaVA's layout: one `llava_id` per picture, which LLaVA replaces by the picture's features."""
    kept, num_image_tokens = [], 0
    for place, token in enumerate(row.input_ids):
        if token == image_token_id:
            num_image_tokens += 1
            if (num_image_tokens - 1) % image_tokens:
                continue
        kept.append(place)
    ids = [llava_id if row.input_ids[place] == image_token_id else row.input_ids[place] for place in kept]
    return Row(ids, [row.labels[place] for place in kept], [len(kept)])


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
