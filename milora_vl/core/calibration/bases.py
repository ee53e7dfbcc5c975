"""The protected input directions of a layer: eigenvectors of C that hold a share of its energy.

`positions_of` weighs the token positions that enter C. Padding does not count. The first position of a row does: it is
an attention sink, which all later positions read, so an update that moves it changes every text. `activations.LARGEST`
limits its energy. Text and picture positions weigh half each in total. The mean weight is 1; in batches without
`input_ids`, every position has weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from milora_vl.common.errors import UserError
from milora_vl.core.svd.gram import full_precision

Batches = Sequence[Mapping[str, Any]]
Calibration = Batches | Mapping[str, Batches]
"""Batches, arguments of the model's forward; or several sources of them by name, which weigh the same."""


def sources_of(calibration: Calibration) -> list[Batches]:
    return list(calibration.values()) or [[]] if isinstance(calibration, Mapping) else [calibration]


def kinds_of(calibration: Calibration) -> list[list[Batches]]:
    """Return the batches of each source in up to two parts, without and with pictures; no part is empty."""
    parts = (
        [[batch for batch in batches if ("pixel_values" in batch) is pictured] for pictured in (False, True)]
        for batches in sources_of(calibration)
    )
    return [[part for part in of_source if part] for of_source in parts]


class CalibrationError(UserError):
    """A calibration that cannot find protected inputs. `where` is a module path or a file."""


@dataclass(frozen=True, slots=True, eq=False)
class InputBasis:
    """The protected directions of one layer input; layers that read the same input share one object.

    - `V`: (in, k) orthonormal in float32, in descending order of energy.
    - `share`: the share of the activation energy trace(C) that they hold.
    - `num_positions`: the number of input vectors in C.
    - `held_out`: `share` on calibration batches that C does not contain; None without such batches.
    """

    V: Tensor
    share: float
    num_positions: int
    held_out: float | None = None


def first_directions(C: Tensor, share: float, most: int) -> tuple[Tensor, float]:
    """Return V (in, k), the fewest eigenvectors of C (in, in) that hold `share` of its trace, and the share they hold.

    There are at most `most`. C is symmetric and has no negative eigenvalues.

    >>> first_directions(torch.diag(torch.tensor([1.0, 6.0, 3.0])), 0.9, 3)[0].abs()
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]])
    """
    total = float(C.diagonal().sum(dtype=torch.float64))
    if total <= 0:
        return C.new_zeros(len(C), 0, dtype=torch.float32), 1.0
    with full_precision(C.device):
        try:
            values, vectors = torch.linalg.eigh(C)
        except torch.linalg.LinAlgError:  # of float32 for clustered eigenvalues, of CUDA 12 beyond 23,000 columns
            values, vectors = torch.linalg.eigh(C.double().cpu())
        values, vectors = values.flip(-1), vectors.flip(-1)
    held = (values.double().clamp(min=0).cumsum(0).cpu() / total).clamp(max=1)
    count = min(int((held < share).sum()) + 1, most)
    return vectors[:, :count].to(C.device, torch.float32).contiguous(), float(held[count - 1]) if count else 0.0


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
        message = "the calibration has no tokens that count"
        hint = "pass batches with input_ids; padding does not count"
        raise CalibrationError(message, where="calibration", hint=hint)
    kinds = sum(number > 0 for number in numbers)
    scales = [sum(numbers) / (kinds * number) if number else 0.0 for number in numbers]
    return [None if mask is None else mask[0] * scales[0] + mask[1] * scales[1] for mask in masks]


def _masks(batch: Mapping[str, Any], image_token: int | None) -> tuple[Tensor, Tensor] | None:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        return None
    ids = ids.detach().cpu()
    given = batch.get("attention_mask")
    real = torch.ones_like(ids) if not isinstance(given, Tensor) else given.detach().cpu()
    real = real.reshape(ids.shape).bool()
    is_picture = torch.zeros_like(real) if image_token is None else ids == image_token
    return real & ~is_picture, real & is_picture
