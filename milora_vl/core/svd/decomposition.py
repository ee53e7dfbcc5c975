"""`decompose`: singular triplets of a weight by the fastest method that certifies them; singular values alone.

| method   | used for                                      | how                                                  |
| -------- | --------------------------------------------- | ---------------------------------------------------- |
| gram     | few components of a large matrix              | search (`search.py`), Gram matrix in float32         |
| gram64   | where gram is not certified                   | search, Gram matrix in float64                       |
| eigh     | small matrices; many components, random ones  | all eigenvectors of the float64 Gram matrix          |
| exact    | `method="exact"`, float64, where eigh fails   | torch.linalg.svd                                     |

A tall W (m, n) with m >= n is assumed inside; a wide weight is transposed, and U and V are swapped at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from milora_vl.core.svd.gram import full_precision
from milora_vl.core.svd.search import EXTRA, Search, triplets

Part = Literal["minor", "principal", "random"]
Algorithm = Literal["auto", "exact", "fast"]

DENSE = 640  # for up to this many rows or columns a whole decomposition is as fast as a search
DENSE_SHARE = 6  # the same holds if more than one component in six is wanted


@dataclass(frozen=True, slots=True)
class Factors:
    """Singular triplets of W (out, in): U (out, r), S (r,) descending, Vh (r, in), with W Vh' = U S.

    - `index`: the positions of S among all singular values in descending order.
    - `norm`: ||W||_F.
    - `sigma_max`: the largest singular value of W; a lower estimate if `method` is gram or gram64.
    - `excess`: a bound on | ||S|| / ||S_true|| - 1 |, proved by the search; 0 is exact up to rounding of the dtype.
    - `method`: `exact` (LAPACK or cuSOLVER), `eigh` (all eigenvectors of a float64 Gram matrix), `gram` or `gram64` (a
      few eigenvectors of a Gram matrix in float32 or float64).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    index: Tensor
    norm: float
    sigma_max: float
    excess: float
    method: str

    def lora(self, scaling: float) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) with `scaling * B @ A` equal to U S Vh (arXiv:2406.09044, eq. 4 and 5).

        A = sqrt(S / scaling) Vh and B = U sqrt(S / scaling), as in the official script. `scaling` is alpha / r.
        Raises ValueError if `scaling` is not a positive number.

        >>> import torch
        >>> from milora_vl.core.svd import decompose
        >>> f = decompose(torch.diag(torch.tensor([9.0, 4.0, 2.0])), rank=1)
        >>> A, B = f.lora(scaling=2.0)
        >>> [round(x, 6) for x in (2.0 * B @ A).diagonal().tolist()]
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
    method: Algorithm = "auto",
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
    refines_left: bool = True,
) -> Factors:
    """Return `rank` singular triplets of `weight` (out, in).

    `part` is minor (the last ones), principal (the first) or random.

    The result is float32 (float64 for a float64 weight), on the device of the weight. The weight is not changed. Signs
    are fixed: in each row of Vh the entry of largest magnitude is positive.

    `method` is one of:

    - `auto`: decompose small matrices as a whole, and search large ones for the wanted components.
    - `fast`: also search small matrices.
    - `exact`: torch.linalg.svd.

    A search proves a bound on the relative error of ||S||. If the bound exceeds `tol`, the next more accurate method is
    used, at last a whole decomposition. `Factors.method` and `Factors.excess` report the method and the bound. A random
    part needs a whole decomposition. `generator` draws the random part and the start of the search; its default has
    seed 0. Without `refines_left` the triplets take less work, and the longer of U and V has the rounding errors of a
    product with W.

    Raises ValueError for a weight that is not a finite floating-point matrix and for a rank outside 1..min(out, in).

    >>> f = decompose(torch.diag(torch.tensor([3.0, 1.0, 2.0])), rank=2)
    >>> [round(s, 6) for s in f.S.tolist()], f.excess
    ([2.0, 1.0], 0.0)
    """
    _check(weight, rank, part, method, tol)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    generator = generator or torch.Generator().manual_seed(0)
    with full_precision(weight.device):
        W = weight.detach().to(dtype)
        W = W if W.shape[0] >= W.shape[1] else W.T
        norm, is_transposed = frobenius(W), W.shape != weight.shape
        if not 1e-12 < norm < 1e12:  # the squares of W could leave the range of the dtype
            if not torch.isfinite(W).all():
                bad = int((~torch.isfinite(W)).sum())
                raise ValueError(f"the weight contains {bad:,} NaN or infinite values, of {W.numel():,}")
            norm, method = frobenius(W.double()), "exact"
        factors = None
        if method == "fast" or (method == "auto" and W.shape[1] > max(DENSE, DENSE_SHARE * (rank + EXTRA))):
            factors = _search(W, norm, rank, part, tol, generator, is_transposed, refines_left)
        if factors is None and method != "exact" and dtype == torch.float32:
            factors = _by_gram_matrix(W, norm, rank, part, generator, refines_left)
        factors = factors or _by_svd(W, norm, rank, part, generator)
        U, Vh = (factors.Vh.T, factors.U.T) if is_transposed else (factors.U, factors.Vh)
        sign = torch.where(Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0).to(dtype)
        if not torch.isfinite(factors.S).all():
            raise ValueError(f"the weight is too large: its singular values exceed the range of {dtype}")
        return replace(factors, U=(U * sign.T).contiguous(), S=factors.S.contiguous(), Vh=(Vh * sign).contiguous())


def frobenius(W: Tensor) -> float:
    """Return ||W||_F, summed row by row in memory order. One long float32 sum would lose digits."""
    rows = W if W.stride(-1) == 1 else W.T
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1), dtype=torch.float64))


def _search(
    W: Tensor, norm: float, rank: int, part: Part, tol: float, generator: torch.Generator, *settings: bool
) -> Factors | None:
    """Return only the wanted triplets of W (m, n), m >= n, or None if that is impossible or not certified."""
    if part == "random" or rank + EXTRA >= W.shape[1] or norm == 0:
        return None
    for dtype in dict.fromkeys((W.dtype, torch.float64)):
        search = Search(W, norm, rank, 1 if part == "minor" else -1, dtype, generator, *settings)
        try:
            result = search.run(tol)
        except torch.linalg.LinAlgError:  # rounding errors have taken over: the next method is more accurate
            result = None
        if result is not None:
            sigma_max = search.sigma_max if part == "minor" else float(result.S[0])
            index = _positions(W.shape[1], rank, part, generator)
            name = "gram" if dtype == torch.float32 else "gram64"
            return Factors(result.U, result.S, result.V.T, index, norm, sigma_max, result.excess, name)
    return None


def _by_gram_matrix(
    W: Tensor, norm: float, rank: int, part: Part, generator: torch.Generator, refines_left: bool
) -> Factors | None:
    """Decompose W (m, n), m >= n, as a whole, by the eigenvectors of W'W in float64.

    This is more accurate than a float32 decomposition of W. Return None if it fails.
    """
    wide = W.double()
    try:
        squares, vectors = torch.linalg.eigh(wide.T @ wide)
    except torch.linalg.LinAlgError:
        return None
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    index = _positions(W.shape[1], rank, part, generator)
    wanted = torch.zeros(len(squares), dtype=torch.bool, device=W.device)
    wanted[index.to(W.device)] = True
    U, S, V = triplets(wide @ vectors[:, wanted], vectors[:, wanted])
    if refines_left and float(torch.linalg.vector_norm(wide.T @ U - V * S)) > 1e-6 * norm:
        return None  # left vectors of zeros
    sigma_max = float(squares[0].sqrt())
    return Factors(U.to(W.dtype), S.to(W.dtype), V.T.to(W.dtype), index, norm, sigma_max, 0.0, "eigh")


def _by_svd(W: Tensor, norm: float, rank: int, part: Part, generator: torch.Generator) -> Factors:
    try:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    except torch.linalg.LinAlgError:  # on some CPUs LAPACK fails in float32 for clustered singular values
        U, S, Vh = (factor.to(W.dtype) for factor in torch.linalg.svd(W.double(), full_matrices=False))
    index = _positions(W.shape[1], rank, part, generator)
    chosen = index.to(S.device)
    return Factors(U[:, chosen], S[chosen], Vh[chosen], index, norm, float(S[0]), 0.0, "exact")


def _positions(count: int, rank: int, part: Part, generator: torch.Generator) -> Tensor:
    """Return the positions of the wanted triplets among `count`, ascending, so that S stays descending."""
    if part == "principal":
        return torch.arange(rank, device="cpu")
    if part == "minor":
        return torch.arange(count - rank, count, device="cpu")
    drawn = torch.randperm(count, generator=generator, device=generator.device)[:rank]
    return drawn.sort().values.cpu()


def _check(weight: Tensor, rank: int, part: str, method: str, tol: float) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(f"the weight must be a torch tensor, got {type(weight).__name__}")
    if weight.layout != torch.strided:
        raise ValueError(f"the weight must be a dense torch tensor, got {weight.layout}")
    if weight.ndim != 2:
        raise ValueError(f"the weight must have 2 dimensions (out, in), got shape {tuple(weight.shape)}")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"the weight must be floating point, got {weight.dtype}: dequantize it first")
    if weight.numel() == 0:
        raise ValueError(f"the weight is empty, shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values: load the model first")
    if isinstance(rank, bool) or not isinstance(rank, Integral) or not 1 <= rank <= min(weight.shape):
        largest_rank = min(weight.shape)
        raise ValueError(f"rank must be an integer in 1..{largest_rank} for shape {tuple(weight.shape)}, got {rank!r}")
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(get_args(Part))}, got {part!r}")
    if method not in get_args(Algorithm):
        raise ValueError(f"method must be one of {', '.join(get_args(Algorithm))}, got {method!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
