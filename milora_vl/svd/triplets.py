"""From a space of right singular vectors to singular triplets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Times eps and the largest singular value: what few digits of a left vector are left below (3e-5 in float32), and none.
WEAK_EPS, VOID_EPS = 256, 2
LOST = 0.5  # of a left vector without its strong components, below which nothing of its own was in it


def triplets(Y: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,) descending and V (n, k) of W on the span of an orthonormal V (n, k); Y = W V (m, k)."""
    Q, R = torch.linalg.qr(Y)
    U, S, Vh = torch.linalg.svd(R)
    return Q @ U, S, V @ Vh.T


@dataclass(frozen=True, slots=True)
class Inverse:
    """`solve` multiplies (n, k) by an approximate inverse of W'W outside the span of V.

    `is_safe` tells that it is that of W'W plus a little: nothing is corrected too far, and more than one pass helps.
    """

    solve: Callable[[Tensor], Tensor]
    is_safe: bool


def refine_left_vectors(
    W: Tensor, U: Tensor, S: Tensor, V: Tensor, sigma_max: float, inverse: Inverse, generator: torch.Generator
) -> Tensor | None:
    """Return U (m, r) without what rounding in W V has put into it; None where that takes a safe inverse.

    Rounding is a share of the largest singular value: next to a far smaller one it points anywhere, also along the
    strongest left vectors. Where nothing of its own is in a vector, a random one takes its place.
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
    # Vectors that were drawn come last: a QR decomposition leaves the first ones as they are.
    order = lost.to(torch.int8).argsort(stable=True)
    pure = pure[:, order]
    for _ in range(3 if inverse.is_safe else 1):
        pure = _without_strong(W, V, pure, inverse) if inverse.is_safe else pure
        pure, _ = torch.linalg.qr(pure - strong @ (strong.T @ pure))
    pure = pure[:, order.argsort()]
    # W V = U S must go on, not W V = -U S.
    against = (pure * weak).sum(dim=0) < 0
    return torch.cat([strong, torch.where(against, -pure, pure)], dim=1)


def _without_strong(W: Tensor, V: Tensor, U: Tensor, inverse: Inverse) -> Tensor:
    P = W.T @ U
    P -= V @ (V.T @ P)
    return U - W @ inverse.solve(P)


def transpose(W: Tensor, U: Tensor, V: Tensor, inverse: Inverse | None, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return triplets of which W'U = V S holds to rounding (`floor`), as W V = U S does for U and V as given.

    With the inverse, for minor components, U takes in what is missing, without it V does, for principal ones.
    """
    P = W.T @ U
    if inverse is None:
        V, core = torch.linalg.qr(P)
        left, S, right = torch.linalg.svd(core)
        return U @ right.T, S, V @ left
    for _ in range(3):
        held = V.T @ P
        U, R = torch.linalg.qr(U - W @ inverse.solve(P - V @ held))
        core = torch.linalg.solve_triangular(R, held, upper=True, left=False)
        P = W.T @ U
        if float(torch.linalg.vector_norm(P - V @ core)) <= floor:
            break
    left, S, right = torch.linalg.svd(core)
    return U @ right.T, S, V @ left
