"""Measures of an update of a weight, as in the paper (arXiv:2406.09044, section 5 and appendix).

Throughout, W is the pretrained weight (out, in) and the update is fine-tuned minus pretrained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from milora_vl.core.svd import Factors, decompose

# Intruder dimensions (arXiv:2410.21228, algorithm 1): number of directions, and the cosine below which one is new.
INTRUDER_K, INTRUDER_EPSILON = 10, 0.5


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """A change of one weight as singular triplets: U (out, k), S (k,) descending, Vh (k, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def from_factors(cls, B: Tensor, A: Tensor) -> LowRankUpdate:
        """Return the change B A from B (out, k), A (k, in), by two thin QR decompositions without forming the matrix.

        Components below the rounding of the largest are removed, so a little trained LoRA may have fewer than k.
        """
        Q_B, R_B = torch.linalg.qr(B.double())
        Q_A, R_A = torch.linalg.qr(A.double().T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
        return cls(Q_B @ U, S, Vh @ Q_A.T)._without_zeros()

    @classmethod
    def from_matrix(cls, change: Tensor, rank: int) -> LowRankUpdate:
        """Return the first `rank` triplets of a change given as a full matrix."""
        factors = decompose(change, min(rank, *change.shape), "principal")
        return cls(factors.U.double(), factors.S.double(), factors.Vh.double())._without_zeros()

    def first(self, rank: int) -> LowRankUpdate:
        """Return the first `rank` triplets, or all if there are fewer."""
        return LowRankUpdate(self.U[:, :rank], self.S[:rank], self.Vh[:rank])

    def _without_zeros(self) -> LowRankUpdate:
        kept = int(torch.count_nonzero(self.S / self.S[0] > 1e-7)) if float(self.S[0]) > 0 else 0
        return self.first(kept)


def amplification(W: Tensor, update: LowRankUpdate, rank: int) -> tuple[float, float]:
    """Return (||U' dW V||_F, ||U' W V||_F) with U, V the top-`rank` singular vectors of the update dW.

    Their ratio is the amplification factor (LoRA paper, section 7.3). It is large if the update is large or if W has
    little energy in its directions, so a lower factor alone does not show that more was preserved: read both numbers.
    """
    top = update.first(rank)
    inside = top.U.T @ (W.double() @ top.Vh.T)
    return float(torch.linalg.vector_norm(top.S)), float(torch.linalg.matrix_norm(inside))


def expected_inside(W_norm: float, shape: tuple[int, int], rank: int) -> float:
    """Return the root mean square of ||U'WV||_F over random orthonormal U (out, rank), V (in, rank).

    >>> round(expected_inside(97.36, (4096, 4096), 64), 2)  # the paper's q_proj: 1.50 for one draw
    1.52
    """
    return rank * W_norm / (shape[0] * shape[1]) ** 0.5


def similarities(base: Factors, update: LowRankUpdate, rank: int) -> tuple[float, float, float]:
    """Return the similarity of the update's left vectors with the top, the bottom and random left vectors of W.

    The similarity of column-orthonormal A, B (d, r) is ||A'B||_F^2 / r, in [0, 1]. `base` is the full decomposition of
    W. The third value is the mean over all choices of `rank` of its vectors.
    """
    vectors = update.first(rank).U
    r = vectors.shape[1]
    if r == 0:
        return 0.0, 0.0, 0.0
    shares = (base.U.double().T @ vectors).square().sum(1)  # one per left vector of W
    return float(shares[:r].sum()) / r, float(shares[-r:].sum()) / r, float(shares.mean())


def intruders(base: Factors, tuned_U: Tensor, epsilon: float = INTRUDER_EPSILON) -> int:
    """Return how many columns of `tuned_U` (out, k), the top left vectors of the tuned weight, are new.

    A vector is new if its cosine with every left singular vector of the pretrained weight is below `epsilon`
    (arXiv:2410.21228, algorithm 1, which uses k = 10 and epsilon = 0.5). `base` is the full decomposition of W.
    """
    cosines = (base.U.double().T @ tuned_U.double()).abs().max(dim=0).values
    return int((cosines < epsilon).sum())


def moved(change: Tensor, start: Tensor) -> float | None:
    """Return ||change||_F / ||start||_F; None if `start` is zero."""
    length = float(torch.linalg.vector_norm(start.double()))
    return float(torch.linalg.vector_norm(change.double())) / length if length else None
