"""Weights of the token positions of a source: padding counts nothing, text and picture tokens half each.

Padding does not count. The first position of a row does: it is an attention sink, which all later positions read, so an
update that moves it changes every text. `activations.LARGEST` limits its energy. Text and picture positions weigh half
each in total. The mean weight is 1; in batches without `input_ids`, every position has weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from milora_vl.core.calibration.bases import CalibrationError


def positions_of(batches: Sequence[Mapping[str, Any]], image_token: int | None) -> list[Tensor | None]:
    """Return the weights (rows, length) of each batch on the CPU, 0 for padding.

    They are None for a batch without `input_ids`, in which all positions count.
    Raises CalibrationError if no position counts.

    >>> batch = {"input_ids": torch.tensor([[1, 7, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    >>> positions_of([batch], image_token=7)[0]
    tensor([[0.7500, 1.5000, 0.7500, 0.0000]])
    """
    masks = [_masks(batch, image_token) for batch in batches]
    numbers = [sum(int(mask[kind].sum()) for mask in masks if mask is not None) for kind in (0, 1)]
    if not batches or (sum(numbers) == 0 and all(mask is not None for mask in masks)):
        raise CalibrationError(
            "the calibration has no tokens that count",
            code="calibration-empty",
            where="calibration",
            hint="pass batches with input_ids; padding does not count",
        )
    kinds = sum(number > 0 for number in numbers)
    scales = [sum(numbers) / (kinds * number) if number else 0.0 for number in numbers]
    return [None if mask is None else mask[0] * scales[0] + mask[1] * scales[1] for mask in masks]


def _masks(batch: Mapping[str, Any], image_token: int | None) -> tuple[Tensor, Tensor] | None:
    """Return the masks of text and of pictures, each (rows, length)."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        return None
    ids = ids.detach().cpu()
    given = batch.get("attention_mask")
    real = torch.ones_like(ids) if not isinstance(given, Tensor) else given.detach().cpu()
    real = real.reshape(ids.shape).bool()
    is_picture = torch.zeros_like(real) if image_token is None else ids == image_token
    return real & ~is_picture, real & is_picture
