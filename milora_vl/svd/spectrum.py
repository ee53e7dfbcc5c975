"""All singular values of a weight, without its singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from milora_vl.svd.precision import full_precision


def singular_values(W: Tensor) -> Tensor:
    """Return the singular values of W (out, in), descending, in float32 (float64 for a float64 weight).

    From the eigenvalues of a float64 Gram matrix, except for float64 weights: right to 3e-8 of the largest, which is
    closer than a float32 decomposition comes. Raises ValueError for NaN and infinity.
    """
    if not torch.isfinite(W).all():
        raise ValueError("the weight holds NaN or infinity")
    with full_precision(W.device):
        W = W.detach() if W.shape[0] >= W.shape[1] else W.detach().T
        if W.dtype == torch.float64:
            return torch.linalg.svdvals(W)
        wide = W.double()
        squares = torch.linalg.eigvalsh(wide.T @ wide)
        return squares.clamp(min=0).sqrt().flip(0).float()
