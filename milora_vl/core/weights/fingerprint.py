"""Fingerprints of weights (random projections), which detect a base model that an adapter was not made for.

A fingerprint holds a few fixed random projections u' W v, where the entries of u and v are +1 or -1, and the norm of W.
Two roundings of one weight agree within the precision of the coarser dtype; two different weights do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from milora_vl.core.svd import frobenius

PROJECTIONS = 8
# Rounding changes a projection by about 0.3 eps ||W||_F; the largest change of many thousands stays below 2 eps.
ALLOWED_EPS = 2.0
# Long float32 sums differ between machines.
FLOAT32_NOISE = 2e-5
# The relative precision of dequantized weights: the error of NF4 is about 9 % of ||W||_F, of 8 bits below 1 %. The
# norms of two different models differ by more than the first value allows.
QUANTIZED_EPS = {torch.uint8: 0.25, torch.int8: 0.02}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Projections of a weight relative to its norm, the norm, the shape (out, in) and the relative rounding unit."""

    values: tuple[float, ...]
    norm: float
    shape: tuple[int, int]
    eps: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Return the fingerprint that was stored as JSON."""
        rows, columns = data["shape"]
        return cls(tuple(data["values"]), data["norm"], (rows, columns), data["eps"])


def fingerprint(W: Tensor, shape: tuple[int, int] | None = None) -> Fingerprint:
    """Return the fingerprint of W (out, in), or of its first rows and columns, `shape` (padded vocabularies)."""
    eps = _precision(W)
    rows, columns = shape or (W.shape[0], W.shape[1])
    W = W[:rows, :columns].detach().float()
    norm = frobenius(W)
    left, right = _signs(rows, 0).to(W.device), _signs(columns, 1).to(W.device)
    values = ((W @ right) * left).sum(0, dtype=torch.float64)
    return Fingerprint(tuple(float(v) / norm if norm > 0 else 0.0 for v in values), norm, (rows, columns), eps)


def distance(saved: Fingerprint, W: Tensor, eps: float = 0.0) -> float:
    """Return the distance of W (out, in) from the weight of `saved`, as a multiple of the rounding error.

    A distance above 1 means another weight. `eps` is the relative precision of a dequantized W, which its dtype does
    not show.

    >>> W = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    >>> distance(fingerprint(W), W.bfloat16()) < 1 < distance(fingerprint(W), 1.1 * W)
    True
    """
    if W.shape[0] < saved.shape[0] or W.shape[1] < saved.shape[1]:
        return float("inf")
    here = fingerprint(W, saved.shape)
    here = replace(here, eps=max(here.eps, eps))
    allowed = FLOAT32_NOISE + ALLOWED_EPS * max(
        saved.eps if saved.eps > 1e-6 else 0.0, here.eps if here.eps > 1e-6 else 0.0
    )
    difference = max(abs(a - b) for a, b in zip(saved.values, here.values, strict=True))
    norm_difference = abs(saved.norm - here.norm) / max(saved.norm, here.norm, 1e-30)
    return max(difference, norm_difference) / allowed


def _precision(W: Tensor) -> float:
    """Return the rounding unit of the values. A half-precision checkpoint loaded in float32 is still coarse."""
    start = W[:64].detach()
    coarse = [t for t in (torch.bfloat16, torch.float16) if torch.equal(start.to(t).to(start.dtype), start)]
    return max(torch.finfo(dtype).eps for dtype in [W.dtype, *coarse])


@lru_cache(maxsize=64)
def _signs(length: int, side: int) -> Tensor:
    """Return signs (length, PROJECTIONS) that depend only on `length` and `side`.

    A generator of numpy or torch could give other numbers in another version or on another device.
    """
    index = torch.arange(length * PROJECTIONS, dtype=torch.int64) + (side + 1) * 0x9E3779B97F4A7C15 % 2**62
    mixed = (index ^ (index >> 30)) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x14D049BB133111EB
    return (((mixed >> 31) & 1) * 2 - 1).float().reshape(length, PROJECTIONS)
