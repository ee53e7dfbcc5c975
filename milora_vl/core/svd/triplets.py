"""Compute singular triplets (U, S, V) from a space of right singular vectors, exact to the last digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Limits for a singular value, as multiples of eps and of the largest one. Below the first (3e-5 in float32), its left
# vector has few correct digits; below the second, none.
WEAK_EPS, VOID_EPS = 256, 2
LOST = 0.5  # a left vector whose norm falls below this when strong components are removed was only rounding


def triplets(Y: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,) descending and V (n, k) of W on the span of V (n, k), given Y = W V (m, k).

    The columns of V are orthonormal.

    >>> W = torch.diag(torch.tensor([3.0, 1.0]))
    >>> triplets(W, torch.eye(2))[1]
    tensor([3., 1.])
    """
    Q, R = torch.linalg.qr(Y)
    U, S, Vh = torch.linalg.svd(R)
    return Q @ U, S, V @ Vh.T


@dataclass(frozen=True, slots=True)
class Inverse:
    """`solve` multiplies (n, k) by an approximate inverse of W'W outside the span of V.

    `is_safe` is True for an inverse of W'W plus a small multiple of I: it never corrects too far, and several passes
    help.
    """

    solve: Callable[[Tensor], Tensor]
    is_safe: bool


def refine_left_vectors(
    W: Tensor, U: Tensor, S: Tensor, V: Tensor, sigma_max: float, inverse: Inverse, generator: torch.Generator
) -> Tensor | None:
    """Return U (m, r) without the rounding errors of W V, or None if that needs a safe inverse.

    The rounding error of W V is a share of the largest singular value. For much smaller singular values it dominates
    the product and can point along the strongest left vectors. A vector that consists of rounding alone is replaced by
    a random one: its singular value is zero to rounding, so any vector orthogonal to the others is a left vector.
    """
    eps = torch.finfo(S.dtype).eps
    sound = int(S.gt(WEAK_EPS * eps * sigma_max).sum())  # S descends
    strong, weak = U[:, :sound], U[:, sound:]
    if not weak.shape[1]:
        return U
    pure = _without_strong(W, V, weak, inverse)
    lost = (torch.linalg.vector_norm(pure, dim=0) < LOST) | (S[sound:] <= VOID_EPS * eps * sigma_max)
    if lost.any():
        if not inverse.is_safe:
            return None
        drawn = torch.randn(pure.shape, generator=generator, device=generator.device, dtype=torch.float32).to(pure)
        pure = torch.where(lost, drawn / len(pure) ** 0.5, pure)
    # Random vectors come last, because a QR decomposition changes the first vectors least.
    order = lost.to(torch.int8).argsort(stable=True)
    pure = pure[:, order]
    for _ in range(3 if inverse.is_safe else 1):
        pure = _without_strong(W, V, pure, inverse) if inverse.is_safe else pure
        pure, _ = torch.linalg.qr(pure - strong @ (strong.T @ pure))
    pure = pure[:, order.argsort()]
    # Keep the signs, so that W V = U S still holds and not W V = -U S.
    is_flipped = (pure * weak).sum(dim=0) < 0
    return torch.cat([strong, torch.where(is_flipped, -pure, pure)], dim=1)


def _without_strong(W: Tensor, V: Tensor, U: Tensor, inverse: Inverse) -> Tensor:
    """Return U (m, k) minus its projection on W V_perp, where V_perp is the complement of V.

    With the strong triplets W V_perp = U_s S_s, an exact inverse of W'W on V_perp is V_perp S_s^-2 V_perp'. So
    W inverse(W'U) = U_s S_s S_s^-2 S_s U_s' U = U_s U_s' U: the part of U along the strong left vectors.
    """
    P = W.T @ U
    P -= V @ (V.T @ P)
    return U - W @ inverse.solve(P)


def transpose(W: Tensor, U: Tensor, V: Tensor, inverse: Inverse | None, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return triplets with W'U = V S up to rounding (`floor`). The given U and V satisfy W V = U S instead.

    With `inverse` (minor components) U is corrected, without it (principal components) V is.
    """
    P = W.T @ U  # (n, k); V S, if the triplets were exact
    if inverse is None:
        V, core = torch.linalg.qr(P)
        left, S, right = torch.linalg.svd(core)
        return U @ right.T, S, V @ left
    # P may leave the span of V, because U contains rounding along strong left vectors. Each pass removes it from U.
    for _ in range(3):
        inside = V.T @ P
        U, R = torch.linalg.qr(U - W @ inverse.solve(P - V @ inside))
        core = torch.linalg.solve_triangular(R, inside, upper=True, left=False)
        P = W.T @ U
        if float(torch.linalg.vector_norm(P - V @ core)) <= floor:
            break
    left, S, right = torch.linalg.svd(core)
    return U @ right.T, S, V @ left
