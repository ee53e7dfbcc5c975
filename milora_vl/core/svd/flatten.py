"""Clip the largest singular values of a matrix, so that its Gram matrix resolves much smaller ones.

The rounding error of W'W is a fixed share of the square of the largest singular value. Trained weights have a few
singular values that are much larger than the others. Clipping them makes the rounding error smaller. The clipped
directions are estimates, so the minor components of W M change a little; `Search._solve` takes M into account.

An example: a weight has the singular values 1000, 2, 1, 0.5, ... In float32 the rounding errors of W'W are about
6e-8 * 1000^2 = 0.06, the square of 0.25: smaller singular values are lost. Clipped at 2, the errors are about 2e-7, and
singular values down to 5e-4 are visible.

>>> W = torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
>>> W[:, 0] *= 100
>>> flat = flatten(W, clip=True, generator=torch.Generator().manual_seed(0))
>>> clipped = torch.linalg.svdvals(torch.cat(list(flat.rows(W.dtype))))
>>> sigma = torch.linalg.svdvals(W)
>>> [bool(value) for value in (sigma[0] > 2000, clipped[0] < 30, (clipped[-20:] / sigma[-20:]).min() > 0.97)]
[True, True, True]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CLIPPED = 80  # the number of singular values to clip
ROWS = 2048  # rows of W per chunk
SAMPLE, STRETCHES = 1024, 4  # rows of the sample, and how many pieces of W they come from
STANDS_OUT = 3.0  # clip if the largest of these values is this many times the smallest
DEEPEST = 1e-3  # the smallest factor that a singular value is multiplied by


@dataclass(frozen=True, slots=True)
class Flattened:
    """W M (m, n) with M = I - V diag(damping) V', which satisfies 0 < M <= I for any orthonormal V (n, k).

    U (m, k) is W V diag(damping). `sigma_max` and `flat_max` estimate the largest singular values of W and of W M.
    """

    W: Tensor
    U: Tensor
    V: Tensor
    damping: Tensor
    sigma_max: float
    flat_max: float

    def scale(self, X: Tensor) -> Tensor:
        """Return M X for X (n, b)."""
        if not len(self.damping):
            return X
        return X - self.V @ (self.damping[:, None] * (self.V.T @ X))

    def rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield W M in chunks of rows (k, n), in `dtype`. All chunks share one buffer."""
        if dtype == self.W.dtype and not len(self.damping):
            yield self.W
            return
        # The chunks have the memory layout of W: a wide weight arrives here as a transposed view.
        is_row_major = self.W.stride(1) == 1
        n = self.W.shape[1]
        buffer = self.W.new_empty((ROWS, n) if is_row_major else (n, ROWS), dtype=dtype)
        for start in range(0, len(self.W), ROWS):
            W = self.W[start : start + ROWS]
            chunk = buffer[: len(W)] if is_row_major else buffer[:, : len(W)].T
            if len(self.damping):
                U = self.U[start : start + ROWS]
                if is_row_major:
                    torch.addmm(W, U, self.V.T, alpha=-1, out=chunk)
                else:
                    torch.addmm(W.T, self.V, U.T, alpha=-1, out=chunk.T)
            else:
                chunk.copy_(W)
            yield chunk


def flatten(W: Tensor, clip: bool, generator: torch.Generator) -> Flattened:
    """Clip the CLIPPED largest singular values of W (m, n) to the smallest of them, if `clip` and they stand out."""
    n = W.shape[1]
    shape = n, min(CLIPPED, n // 4)
    X = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).to(W)
    sample = _sample(W)
    sigma = _in_space(sample @ torch.linalg.qr(sample.T @ (sample @ X)).Q)[0]
    if not clip or _are_similar(sigma):
        empty = W.new_empty(0)
        sigma_max = float(sigma[-1]) * (len(W) / len(sample)) ** 0.5
        return Flattened(W, empty, empty, empty, sigma_max, sigma_max)
    X, _ = torch.linalg.qr(W.T @ (W @ X))
    Y = W @ X
    sigma, rotation = _in_space(Y)
    level = max(float(sigma[0]), DEEPEST * float(sigma[-1]))
    damping = (1 - level / sigma.clamp(min=level)).to(W.dtype)
    # One step of subspace iteration underestimates the smallest of these values by less than a factor of two.
    return Flattened(W, Y @ (rotation * damping), X @ rotation, damping, float(sigma[-1]), 2 * level)


def _in_space(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values (k,), ascending in float64, and the right singular vectors (k, k) of Y (m, k)."""
    wide = Y.double()
    squares, rotation = torch.linalg.eigh(wide.T @ wide)
    return squares.clamp(min=0).sqrt(), rotation.to(Y.dtype)


def _are_similar(sigma: Tensor) -> bool:
    return float(sigma[-1]) <= STANDS_OUT * float(sigma[0])


def _sample(W: Tensor) -> Tensor:
    """Return a few evenly spaced blocks of rows, enough to detect whether some components stand out."""
    if len(W) < 2 * SAMPLE:
        return W
    starts = [len(W) * k // STRETCHES for k in range(STRETCHES)]
    return torch.cat([W[start : start + SAMPLE // STRETCHES] for start in starts])
