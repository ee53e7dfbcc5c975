"""Llama 3.2 Vision reads pictures by cross-attention, which a text without a picture has to pass unchanged.

transformers skips these layers for a batch of texts alone. In a mixed batch it lets a text without a picture attend to
the pictures of its row, which are padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def pass_texts_unchanged(model: nn.Module) -> None:
    """Let the cross-attention layers of a model, if it has any, return rows without a picture as they came."""
    for module in model.modules():
        if "cross_attn_attn_gate" in dict(module.named_parameters(recurse=False)):
            module.register_forward_hook(_unchanged, with_kwargs=True)  # a second one changes nothing


def _unchanged(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    sees = kwargs["full_text_row_masked_out_mask"]  # (rows, 1, length, 1): 0 where a token attends to no picture
    return output if sees is None else torch.where(sees[:, 0].any(dim=1, keepdim=True), output, args[0])
