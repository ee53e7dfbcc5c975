"""A sketch of a weight, to tell whether an adapter meets the base model it was made for.

A few fixed random projections u^T W v (entries of u and v are +-1) and the norm of W. Two roundings of one weight agree
within the coarser dtype; two different weights do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from milora_vl.svd import frobenius

PROJECTIONS = 8
# Rounding to b bits moves a projection by about 0.3 eps ||W||_F; the largest of many thousands stays below 2 eps.
ALLOWED_EPS = 2.0
# Sums of many products in float32 differ between machines.
FLOAT32_NOISE = 2e-5
# What dequantised weights are worth: NF4 is off by some 9 % of ||W||_F, 8 bits by less than 1 %. The norms of two
# different models differ by more than the first allows.
QUANTIZED_EPS = {torch.uint8: 0.25, torch.int8: 0.02}


@dataclass(frozen=True, slots=True)
class Sketch:
    """Projections of a weight relative to its norm, the norm, the shape (out, in) and the relative rounding unit."""

    values: tuple[float, ...]
    norm: float
    shape: tuple[int, int]
    eps: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sketch:
        """Read a sketch back from JSON."""
        rows, columns = data["shape"]
        return cls(tuple(data["values"]), float(data["norm"]), (int(rows), int(columns)), float(data["eps"]))


def sketch(W: Tensor, shape: tuple[int, int] | None = None) -> Sketch:
    """Return the sketch of W (out, in); of its first rows and columns with `shape` (padded vocabularies)."""
    eps = _precision(W)
    rows, columns = shape or (W.shape[0], W.shape[1])
    W = W[:rows, :columns].detach().float()
    norm = frobenius(W)
    left, right = _signs(rows, 0).to(W.device), _signs(columns, 1).to(W.device)
    values = ((W @ right) * left).sum(0, dtype=torch.float64)
    return Sketch(tuple(float(v) / norm if norm > 0 else 0.0 for v in values), norm, (rows, columns), eps)


def distance(saved: Sketch, W: Tensor, eps: float = 0.0) -> float:
    """Return how far W is from the sketched weight, in units of what rounding explains; above 1 it is another.

    `eps` is the relative precision of a W that was dequantised, which its own dtype does not show.
    """
    if W.shape[0] < saved.shape[0] or W.shape[1] < saved.shape[1]:
        return float("inf")
    here = sketch(W, saved.shape)
    here = replace(here, eps=max(here.eps, eps))
    allowed = FLOAT32_NOISE + ALLOWED_EPS * max(
        saved.eps if saved.eps > 1e-6 else 0.0, here.eps if here.eps > 1e-6 else 0.0
    )
    apart = max(abs(a - b) for a, b in zip(saved.values, here.values, strict=True))
    norms = abs(saved.norm - here.norm) / max(saved.norm, here.norm, 1e-30)
    return max(apart, norms) / allowed


def _precision(W: Tensor) -> float:
    """The rounding unit of the values: a half-precision checkpoint that was loaded wider is still rounded."""
    start = W[:64].detach()
    coarse = [t for t in (torch.bfloat16, torch.float16) if torch.equal(start.to(t).to(start.dtype), start)]
    return max(torch.finfo(dtype).eps for dtype in [W.dtype, *coarse])


@lru_cache(maxsize=64)
def _signs(length: int, side: int) -> Tensor:
    """Signs (length, PROJECTIONS) that depend on nothing but length and side; numpy's or a device's rng would."""
    index = torch.arange(length * PROJECTIONS, dtype=torch.int64) + (side + 1) * 0x9E3779B97F4A7C15 % 2**62
    mixed = (index ^ (index >> 30)) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x14D049BB133111EB
    return (((mixed >> 31) & 1) * 2 - 1).float().reshape(length, PROJECTIONS)
