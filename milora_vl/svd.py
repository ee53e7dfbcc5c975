"""The singular value decomposition of one weight: minor, principal or random components (arXiv:2406.09044, section 3).

Letters as in the paper: W (out, in) = U S Vh, singular values descending, r the rank, s the LoRA scaling alpha/r.
Needs torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Part = Literal["minor", "principal", "random"]
Method = Literal["auto", "exact", "fast"]

# Differences below this share of the norm of W are float32 rounding, not an error of the subspace.
FLOAT32_FLOOR = 5e-7


@dataclass(frozen=True, slots=True)
class Factors:
    """The chosen singular triplets: U (out, r), S (r,) descending, Vh (r, in).

    `spectrum` holds all singular values, descending; `index` the positions of S in it. `excess` is the certificate
    (0 is exact, see `excess_of`), `method` says how the factors were made.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    spectrum: Tensor
    index: Tensor
    excess: float
    method: str

    def lora(self, scaling: float) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) with `scaling * B @ A` equal to U S Vh (arXiv:2406.09044, eq. 4 and 5).

        The official script divides S by the scaling before it takes the root; so do we.
        Raises ValueError if `scaling` is not a positive number.

        >>> f = decompose(torch.diag(torch.tensor([9.0, 4.0, 2.0])), rank=1)
        >>> A, B = f.lora(scaling=2.0)
        >>> (2.0 * B @ A).diagonal().tolist()
        [0.0, 0.0, 2.0]
        """
        if not 0 < scaling < float("inf"):
            raise ValueError(f"scaling must be a positive number, got {scaling}")
        root = (self.S / scaling).sqrt()
        return (root[:, None] * self.Vh).contiguous(), (self.U * root).contiguous()


def decompose(
    weight: Tensor,
    rank: int,
    part: Part = "minor",
    *,
    method: Method = "auto",
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return `rank` singular triplets of `weight` (out, in): the last, the first, or a random choice.

    Works in float32 (float64 for a float64 weight) on the weight's device and leaves the weight as it is. Signs are
    fixed: the entry of largest magnitude in each row of Vh is positive. `tol` is the largest excess that a faster
    method may leave; `exact` (what `auto` takes) leaves none. `generator` draws the random part (seed 0 without one).

    Raises ValueError for a weight that is not a finite floating-point matrix and for a rank outside 1..min(out, in).

    >>> f = decompose(torch.diag(torch.tensor([3.0, 1.0, 2.0])), rank=2)
    >>> f.S.tolist(), f.excess
    ([2.0, 1.0], 0.0)
    """
    _check(weight, rank, part, method, tol)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    W = weight.detach().to(dtype)
    if not torch.isfinite(W).all():
        bad = int((~torch.isfinite(W)).sum())
        raise ValueError(f"the weight holds {bad:,} values that are NaN or infinite, of {W.numel():,}")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    index = _choose(S.numel(), rank, part, generator).to(S.device)
    U, chosen, Vh = _fix_signs(U[:, index], S[index], Vh[index])
    return Factors(U, chosen, Vh, S, index, excess_of(W, U, chosen, Vh), "exact")


def excess_of(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> float:
    """How much more of W (out, in) the subspace holds than its singular values S say; 0 is exact.

    `||W V||_F / ||S|| - 1` for W (out >= in), the transpose rule for wide W. Differences below the float32 floor count
    as none, which also settles S = 0.
    """
    held = _norm(W @ Vh.T if W.shape[0] >= W.shape[1] else U.T @ W)
    stated = _norm(S)
    difference = held - stated
    if abs(difference) <= FLOAT32_FLOOR * max(_norm(W), 4 * stated):  # LAPACK's S has a few units of rounding itself
        return 0.0
    return difference / stated if stated > 0 else float("inf")


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _check(weight: Tensor, rank: int, part: str, method: str, tol: float) -> None:
    if weight.ndim != 2:
        raise ValueError(f"the weight must have 2 dimensions (out, in), got shape {tuple(weight.shape)}")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"the weight must be floating point, got {weight.dtype}: dequantise it first")
    if weight.numel() == 0:
        raise ValueError(f"the weight is empty, shape {tuple(weight.shape)}")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(weight.shape):
        largest = min(weight.shape)
        raise ValueError(f"rank must be an integer in 1..{largest} for shape {tuple(weight.shape)}, got {rank!r}")
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(get_args(Part))}, got {part!r}")
    if method == "fast":
        raise ValueError("method 'fast' is not available in this version: use 'exact' or 'auto'")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")


def _choose(count: int, rank: int, part: Part, generator: torch.Generator | None) -> Tensor:
    """Positions of the wanted triplets among `count`, ascending (so that S stays descending)."""
    if part == "principal":
        return torch.arange(rank)
    if part == "minor":
        return torch.arange(count - rank, count)
    generator = generator or torch.Generator().manual_seed(0)
    drawn = torch.randperm(count, generator=generator, device=generator.device)[:rank]
    return drawn.sort().values


def _fix_signs(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the entry of largest magnitude in every row of Vh positive; contiguous copies."""
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(Vh.dtype)
    return (U * sign.T).contiguous(), S.contiguous(), (Vh * sign).contiguous()
