"""Clip the strongest singular values of a matrix: its Gram matrix then sees far smaller ones.

Rounding in W'W is a fixed share of the largest singular value squared, and trained weights have a few that stand out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CLIPPED = 80
ROWS = 2048  # of W at a time, in the precision of its Gram matrix
SAMPLE, STRETCHES = 1024, 4
STANDS_OUT = 3.0  # the first over the last of them
DEEPEST = 1e-3  # no singular value is scaled down by more


@dataclass(frozen=True, slots=True)
class Flattened:
    """W M (m, n) with M = I - V diag(damping) V', positive definite and at most I whatever the orthonormal V (n, k).

    U (m, k) is W V diag(damping). `sigma_max` and `flat_max` are about the largest singular values of W and of W M.
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
        """Yield W M in chunks of rows (k, n), in `dtype`; a chunk lasts until the next one."""
        if dtype == self.W.dtype and not len(self.damping):
            yield self.W
            return
        # In the memory layout of W: a wide weight comes here as the transpose of what is stored.
        upright = self.W.stride(1) == 1
        n = self.W.shape[1]
        room = self.W.new_empty((ROWS, n) if upright else (n, ROWS), dtype=dtype)
        for start in range(0, len(self.W), ROWS):
            W = self.W[start : start + ROWS]
            chunk = room[: len(W)] if upright else room[:, : len(W)].T
            if len(self.damping):
                U = self.U[start : start + ROWS]
                if upright:
                    torch.addmm(W, U, self.V.T, alpha=-1, out=chunk)
                else:
                    torch.addmm(W.T, self.V, U.T, alpha=-1, out=chunk.T)
            else:
                chunk.copy_(W)
            yield chunk


def flatten(W: Tensor, clip: bool, generator: torch.Generator) -> Flattened:
    """Clip the largest singular values of W (m, n) to the last of them, if they stand out and `clip` allows it."""
    n = W.shape[1]
    shape = n, min(CLIPPED, n // 4)
    X = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).to(W)
    sample = _sample(W)
    sigma = _in_space(sample @ torch.linalg.qr(sample.T @ (sample @ X)).Q)[0]
    if not clip or _alike(sigma):
        nothing = W.new_empty(0)
        sigma_max = float(sigma[-1]) * (len(W) / len(sample)) ** 0.5
        return Flattened(W, nothing, nothing, nothing, sigma_max, sigma_max)
    X, _ = torch.linalg.qr(W.T @ (W @ X))
    Y = W @ X
    sigma, rotation = _in_space(Y)
    level = max(float(sigma[0]), DEEPEST * float(sigma[-1]))
    damping = (1 - level / sigma.clamp(min=level)).to(W.dtype)
    # One step of subspace iteration finds the last of them too small by less than a factor of two.
    return Flattened(W, Y @ (rotation * damping), X @ rotation, damping, float(sigma[-1]), 2 * level)


def _in_space(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (k,), ascending in float64, and right singular vectors (k, k) of Y (m, k)."""
    wide = Y.double()
    squares, rotation = torch.linalg.eigh(wide.T @ wide)
    return squares.clamp(min=0).sqrt(), rotation.to(Y.dtype)


def _alike(sigma: Tensor) -> bool:
    return float(sigma[-1]) <= STANDS_OUT * float(sigma[0])


def _sample(W: Tensor) -> Tensor:
    """A few stretches of rows, evenly spread: enough to see whether strong components are there at all."""
    if len(W) < 2 * SAMPLE:
        return W
    starts = [len(W) * k // STRETCHES for k in range(STRETCHES)]
    return torch.cat([W[start : start + SAMPLE // STRETCHES] for start in starts])
