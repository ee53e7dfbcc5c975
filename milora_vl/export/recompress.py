"""Recompress an adapter to the nearest LoRA of a lower rank: truncated SVD of s (B A - B0 A0), and its error.

The joined factors bound the rank of a change, so two thin QR decompositions and one small SVD suffice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from milora_vl.interop.lora_folder import LowRank, PlainAdapter


@dataclass(frozen=True, slots=True)
class Loss:
    """The error of recompression: squared norms of the change and of the lost part, and the rank kept."""

    rank: int
    total: float
    lost: float

    @property
    def error(self) -> float:
        return (self.lost / self.total) ** 0.5 if self.total > 0 else 0.0


def recompress(
    adapter: PlainAdapter, rank: int | None, dtype: torch.dtype | None = None
) -> tuple[PlainAdapter, dict[str, Loss]]:
    """Return the adapter with factors of `rank`, and the loss per module.

    None means the r of each module: its rule's rank, else half the rank of its joined factors. Modules of lower rank
    keep their rank. The loss includes the rounding of the stored factors to `dtype`.
    """
    targets = adapter.sidecar.targets if adapter.sidecar is not None else ()
    own = {target.path: target.rank for target in targets}
    factors, losses = {}, {}
    for path, low in adapter.factors.items():
        small = _truncate(low, rank or own.get(path) or max(1, low.rank // 2))
        factors[path] = small if dtype is None else small.cast(dtype)
        losses[path] = loss_of(low, factors[path])
    return replace(adapter, factors=factors, sidecar=None), losses


def loss_of(low: LowRank, stored: LowRank) -> Loss:
    """Return the loss of `stored` relative to the change of `low`, by QR without a full-size matrix."""
    (A, B), (A1, B1) = ([t.double() for t in factors.matrices()] for factors in (low, stored))
    return Loss(stored.rank, _square(B, A), _square(torch.cat([B, -B1], dim=1), torch.cat([A, A1])))


def _square(B: Tensor, A: Tensor) -> float:
    R_B, R_A = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    return float((R_B @ R_A.T).square().sum())


def total_error(losses: dict[str, Loss]) -> float:
    """Return the relative error of the whole adapter, as if all changes were blocks of one matrix."""
    return Loss(0, sum(loss.total for loss in losses.values()), sum(loss.lost for loss in losses.values())).error


def _truncate(low: LowRank, rank: int) -> LowRank:
    A, B = (t.double() for t in low.matrices())
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    kept = min(rank, S.numel())
    root = S[:kept].sqrt()
    new_A, new_B = root[:, None] * (Vh[:kept] @ Q_A.T), (Q_B @ U[:, :kept]) * root
    return low.replaced(_like(new_A, low.A), _like(new_B, low.B), 1.0)


def _like(tensor: Tensor, stored: Tensor) -> Tensor:
    return tensor.to(stored.dtype).contiguous()
