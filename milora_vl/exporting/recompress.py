"""A LoRA of lower rank nearest to an adapter: the truncated SVD of each change s (B A - B0 A0), and what it loses.

The change has at most the rank of the joined factors, so two thin QR decompositions and one small SVD are enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from milora_vl.exporting.plain import LowRank, PlainAdapter


@dataclass(frozen=True, slots=True)
class Loss:
    """What re-compression leaves out: squared norms of the change and of the part that is lost, and the rank kept."""

    rank: int
    total: float
    lost: float

    @property
    def error(self) -> float:
        """||change - kept||_F / ||change||_F."""
        return (self.lost / self.total) ** 0.5 if self.total > 0 else 0.0


def recompress(adapter: PlainAdapter, rank: int | None) -> tuple[PlainAdapter, dict[str, Loss]]:
    """Return the adapter with factors of `rank` (None: half of what each module has, its r), and the loss by module.

    Modules of a lower rank keep theirs, exactly.
    """
    factors, losses = {}, {}
    for path, low in adapter.factors.items():
        factors[path], losses[path] = _truncate(low, rank if rank is not None else max(1, low.rank // 2))
    return replace(adapter, factors=factors, sidecar=None), losses


def total_error(losses: dict[str, Loss]) -> float:
    """The relative error of the whole adapter, as if all changes stood in one matrix."""
    return Loss(0, sum(loss.total for loss in losses.values()), sum(loss.lost for loss in losses.values())).error


def _truncate(low: LowRank, rank: int) -> tuple[LowRank, Loss]:
    A, B = (t.double() for t in low.matrices())
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    kept = min(rank, S.numel())
    root = S[:kept].sqrt()
    new_A, new_B = root[:, None] * (Vh[:kept] @ Q_A.T), (Q_B @ U[:, :kept]) * root
    squares = S.square()
    loss = Loss(kept, float(squares.sum()), float(squares[kept:].sum()))
    return low.replaced(_like(new_A, low.A), _like(new_B, low.B), 1.0), loss


def _like(tensor: Tensor, stored: Tensor) -> Tensor:
    return tensor.to(stored.dtype).contiguous()
