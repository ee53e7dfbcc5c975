"""All singular values of a weight, without its singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from milora_vl.svd.precision import full_precision


def singular_values(W: Tensor) -> Tensor:
    """Return the singular values of W (out, in), descending, in float32 (float64 for a float64 weight).

    They come from the eigenvalues of a float64 Gram matrix, except for float64 weights. The error is below 3e-8 of the
    largest value, less than in a float32 decomposition. Raises ValueError for NaN and infinite values.
    """
    if not torch.isfinite(W).all():
        raise ValueError("the weight contains NaN or infinite values")
    with full_precision(W.device):
        W = W.detach() if W.shape[0] >= W.shape[1] else W.detach().T
        if W.dtype == torch.float64:
            return torch.linalg.svdvals(W)
        wide = W.double()
        squares = torch.linalg.eigvalsh(wide.T @ wide)
        return squares.clamp(min=0).sqrt().flip(0).float()
