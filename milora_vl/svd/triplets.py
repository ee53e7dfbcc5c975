"""From a space of right singular vectors to singular triplets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of the largest singular value: below it two digits or less are left of a left vector (3e-5 in float32).
WEAK_EPS = 256


def triplets(Y: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,) descending and V (n, k) of W on the span of an orthonormal V (n, k); Y = W V (m, k)."""
    Q, R = torch.linalg.qr(Y)
    U, S, Vh = torch.linalg.svd(R)
    return Q @ U, S, V @ Vh.T


def polished(W: Tensor, U: Tensor, S: Tensor, V: Tensor, sigma_max: float, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Return U (m, r) without what rounding in W V has put into it.

    That is a share of the largest singular value: next to a far smaller one it points anywhere, also along the
    strongest left vectors. `solve` multiplies by an approximate inverse of W'W outside the span of V (n, r).
    """
    sound = int(S.gt(WEAK_EPS * torch.finfo(S.dtype).eps * sigma_max).sum())  # S descends
    strong, weak = U[:, :sound], U[:, sound:]
    if not weak.shape[1]:
        return U
    P = W.T @ weak
    P -= V @ (V.T @ P)
    pure = weak - W @ solve(P)
    pure, _ = torch.linalg.qr(pure - strong @ (strong.T @ pure))
    # W V = U S must go on, not W V = -U S.
    against = (pure * weak).sum(dim=0) < 0
    return torch.cat([strong, torch.where(against, -pure, pure)], dim=1)


def mirrored(
    W: Tensor, U: Tensor, V: Tensor, solve: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return triplets of which W'U = V S holds to rounding, as W V = U S does for U and V as given.

    `solve` multiplies by the inverse of W'W outside the span of V, for minor components: U takes in what is missing.
    Without it V does, for principal ones.
    """
    P = W.T @ U
    if solve is None:
        V, core = torch.linalg.qr(P)
    else:
        held = V.T @ P
        U, R = torch.linalg.qr(U - W @ solve(P - V @ held))
        core = torch.linalg.solve_triangular(R, held, upper=True, left=False)
    left, S, right = torch.linalg.svd(core)
    return U @ right.T, S, V @ left
