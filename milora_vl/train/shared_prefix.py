"""Compute once what all rows of a batch begin with: the system prompt of a chat template.

The rows of a batch share their first P tokens, and no token of a row depends on a later one. So the language model can
read the batch as one row, the prefix followed by the rest of every row,

    [prefix | rest of row 1 | rest of row 2 | ...]        P + rows (L - P) tokens instead of rows L

if each token keeps its position, and if a rest attends to the prefix and to itself alone. Every loss and gradient is
that of the separate rows, up to rounding. Of the demo's 75 tokens a record, 33 are the system prompt.

`attention` below does this where the recipe says `attn_implementation: eager`, as the demo's does. It knows such a
batch by its mask, whose first dimension is the number of rows; for other batches it is eager attention without copies
of the keys and values for the query heads that share them.

>>> ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0]])
>>> labels = torch.tensor([[-100, -100, -100, 4], [-100, -100, -100, -100]])
>>> batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
>>> shared = share(batch, image_token=None, dtype=torch.float32)
>>> shared["input_ids"].tolist(), shared["position_ids"].tolist()
([[1, 2, 3, 4, 2, 5, 0]], [[0, 1, 2, 3, 1, 2, 3]])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from milora_data.encode.tokens import IGNORE

ATTENTION = "milora_vl_eager"  # the name of `attention` in transformers
# Language models whose attention is causal, without a window, and takes positions of one dimension.
LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
LEAST = 0.05  # the share of a batch's tokens that must be saved


def use_attention(model: nn.Module) -> bool:
    """Let the language model attend with `attention`; return False and change nothing for other kinds of models."""
    config: Any = model.config
    text = config.get_text_config().to_dict()
    has_window = text.get("sliding_window") is not None and text.get("use_sliding_window", True)
    kind = text["model_type"]
    if kind not in LANGUAGE_MODELS or config.model_type not in ("llava", kind) or has_window:
        return False
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
    model.get_decoder().set_attn_implementation(ATTENTION)  # type: ignore[operator]
    return True


def can_share(model: nn.Module) -> bool:
    """Return whether rows of a batch may share their prefix: with dropout, each row has a mask of its own."""
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return text._attn_implementation == ATTENTION and not text.attention_dropout and not has_dropout


def share(inputs: dict[str, Any], *, image_token: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the batch as one row with a common prefix, or the batch itself if that would save little.

    `inputs` has input_ids, attention_mask and labels (rows, length), padded on the right. The prefix ends before the
    first picture and before the first label. The mask becomes (rows, 1, rest, length), 0 or the lowest number of
    `dtype`.
    """
    ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"]
    count, length = ids.shape
    if mask is None or mask.dim() != 2 or "position_ids" in inputs:  # packed rows have positions
        return inputs
    is_common = (ids == ids[:1]).all(0) & (mask == 1).all(0) & (labels == IGNORE).all(0)
    if image_token is not None:
        is_common &= ids[0] != image_token
    # In the one row, a token of another row precedes each rest. So the first token of a rest must have no label: the
    # prefix ends one common token early.
    size = int(is_common.long().cumprod(0).sum()) - 1
    if size <= 0 or (count - 1) * size < LEAST * count * length:
        return inputs
    positions = torch.arange(length, device=ids.device)
    is_past = positions <= positions[size:, None]  # (rest, length)
    is_hidden = ~(is_past & (mask != 0)[:, None])  # (rows, rest, length)

    def joined(rows: Tensor) -> Tensor:
        return torch.cat([rows[:1, :size], rows[:, size:].reshape(1, -1)], dim=1)

    return {
        **inputs,
        "input_ids": joined(ids),
        "labels": joined(labels),
        "position_ids": joined(positions.expand(count, -1)),
        "attention_mask": is_hidden.to(dtype).masked_fill_(is_hidden, torch.finfo(dtype).min)[:, None],
    }


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return (batch, length, heads, size) from queries (batch, heads, length, size), as transformers' eager attention.

    The weights of the attention are not returned.

    Keys and values are (batch, key heads, length, size). With one row and a mask of several, the row is a prefix and
    the rests of `share`.
    """
    dropout = dropout if module.training else 0.0
    if attention_mask is None or len(attention_mask) == 1 or len(query) > 1:
        return _attend(query, key, value, attention_mask, scaling, dropout).transpose(1, 2).contiguous(), None
    rows, rest = len(attention_mask), attention_mask.shape[2]
    size = attention_mask.shape[3] - rest

    def rests(states: Tensor) -> Tensor:  # (1, heads, length, size) -> (rows, heads, rest, size)
        return states[0, :, size:].unflatten(1, (rows, rest)).transpose(0, 1)

    def with_prefix(states: Tensor) -> Tensor:
        return torch.cat([states[:, :, :size].expand(rows, -1, -1, -1), rests(states)], dim=2)

    causal = query.new_full((size, size), torch.finfo(query.dtype).min).triu(1)[None, None]
    prefix = _attend(query[:, :, :size], key[:, :, :size], value[:, :, :size], causal, scaling, dropout)
    rest_of_rows = _attend(rests(query), with_prefix(key), with_prefix(value), attention_mask, scaling, dropout)
    return torch.cat([prefix.transpose(1, 2), rest_of_rows.transpose(1, 2).flatten(0, 1)[None]], dim=1), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """Return (batch, heads, length, size). Query heads that share a key head are rows of one product with it."""
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    scores = query.reshape(batch, groups, -1, size) @ key.transpose(2, 3) * scaling
    scores = scores.unflatten(2, (heads // groups, length))
    if mask is not None:
        scores = scores + mask[:, :, None]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights.flatten(2, 3) @ value).unflatten(2, (heads // groups, length)).flatten(1, 2)
