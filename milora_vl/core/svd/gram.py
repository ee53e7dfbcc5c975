"""Gram matrices W'W in true float32, and W with its largest singular values clipped (`flatten`).

Only the blocks on and below the diagonal of a Gram matrix are computed and read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast, TF32 products, bfloat16 products and gradients, and restore the settings at the end."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
            before = [switch.fp32_precision for switch in switches]
        except AttributeError:  # torch < 2.9 has a single setting for all backends
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(precision)
            return
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value


BLOCK = 256  # small, because the diagonal blocks are factored at LAPACK's speed


def _blocks(n: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive blocks that cover 0..n."""
    for start in range(0, n, size):
        yield start, min(start + size, n)


def lower_gram(rows: Iterable[Tensor], n: int) -> Tensor:
    """Return the sum of C'C (n, n) over the row chunks C (k, n). Entries above the diagonal blocks are undefined."""
    G = None
    for chunk in rows:
        if G is None:
            G = chunk.new_empty(n, n)
            _add(chunk, G, 0, n, beta=0)
        else:
            _add(chunk, G, 0, n, beta=1)
    assert G is not None
    return G


def add_to_lower(G: Tensor, C: Tensor) -> None:
    """Add C'C for C (k, n) to the entries of G (n, n) on and below the diagonal, with half of the work of a product.

    Some entries above the diagonal change too; `mirror` replaces them.

    >>> G = torch.zeros(3, 3)
    >>> add_to_lower(G, torch.tensor([[1.0, 2.0, 3.0]]))
    >>> mirror(G)[0]
    tensor([1., 2., 3.])
    """
    _add(C, G, 0, len(G), beta=1)


def mirror(G: Tensor) -> Tensor:
    """Fill the entries of G (n, n) above its diagonal blocks with those below, in place, and return it."""
    for a, b in _blocks(len(G), BLOCK):
        G[:a, a:b] = G[a:b, :a].T
    return G


def mean_eigenvalue(G: Tensor) -> float:
    """Return the mean of the eigenvalues of G (n, n), weighted by themselves: ||G||_F^2 / trace G.

    It is a lower estimate of the largest eigenvalue.
    """
    total = 0.0
    for a, b in _blocks(len(G), BLOCK):
        corner, left = (float(torch.linalg.vector_norm(part)) for part in (G[a:b, a:b], G[a:b, :a]))
        total += corner**2 + 2 * left**2
    return total / max(float(G.diagonal().sum()), 1e-300)


def _add(C: Tensor, G: Tensor, a: int, b: int, beta: int) -> None:
    """Add C'C to the triangle a..b of G. Halving the triangle makes most of the work one large square product."""
    if b - a <= BLOCK:
        G[a:b, a:b].addmm_(C[:, a:b].T, C[:, a:b], beta=beta)
        return
    middle = a + -(-(b - a) // (2 * BLOCK)) * BLOCK
    _add(C, G, a, middle, beta)
    _add(C, G, middle, b, beta)
    G[middle:b, a:middle].addmm_(C[:, middle:b].T, C[:, a:middle], beta=beta)


class Cholesky:
    """The factor L (n, n) of L L' = G + lift V V' - shift I, with explicit inverses of its diagonal blocks.

    Column block by column block, for blocks j and i > j of this matrix A:

        L_jj L_jj' = A_jj - sum_{k<j} L_jk L_jk'            LAPACK, on one small block
        L_ij = (A_ij - sum_{k<j} L_ik L_jk') L_jj^-T        products of large matrices

    With the inverses L_jj^-1, solving needs only matrix products too.

    >>> factor = Cholesky.of(torch.tensor([[4.0, 2.0], [2.0, 3.0]]), torch.empty(2, 2), shift=1.0)
    >>> factor.solve(torch.tensor([[3.0], [2.0]])).round().tolist()  # of [[3, 2], [2, 2]]
    [[1.0], [0.0]]
    >>> Cholesky.of(torch.eye(2), torch.empty(2, 2), shift=2.0) is None  # 1 - 2 < 0
    True
    """

    def __init__(self, L: Tensor, inverses: list[Tensor]) -> None:
        self._L, self._inverses = L, inverses

    @classmethod
    def of(cls, G: Tensor, out: Tensor, shift: float, V: Tensor | None = None, lift: float = 0.0) -> Cholesky | None:
        """Factor G + lift V V' - shift I into `out` (n, n), or return None if it is not positive definite.

        G (n, n) has the form that `lower_gram` returns, and is not changed; V is (n, k) or None.
        """
        n, inverses = len(G), []
        raised = None if V is None else V * lift**0.5
        buffer = G.new_empty(n, BLOCK)
        for a, b in _blocks(n, BLOCK):
            column = buffer[: n - a, : b - a]
            if raised is None:
                column.copy_(G[a:, a:b])
            else:
                torch.addmm(G[a:, a:b], raised[a:], raised[a:b].T, out=column)
            if a:
                column.addmm_(out[a:, :a], out[a:b, :a].T, alpha=-1)
            column.diagonal().sub_(shift)
            corner, failed = torch.linalg.cholesky_ex(column[: b - a])
            if failed.item():  # an eigenvalue is at most `shift`: this is the test that the search relies on
                return None
            identity = torch.eye(b - a, dtype=G.dtype, device=G.device)
            inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
            if not torch.isfinite(inverse).all():
                return None
            inverses.append(inverse)
            out[a:b, a:b] = corner
            torch.mm(column[b - a :], inverse.T, out=out[b:, a:b])
        return cls(out, inverses)

    def solve(self, X: Tensor) -> Tensor:
        """Return (L L')^-1 X for X (n, k)."""
        n, Y = len(X), X.clone()
        bounds = list(zip(_blocks(n, BLOCK), self._inverses, strict=True))
        for (a, b), inverse in bounds:
            if a:
                Y[a:b].addmm_(self._L[a:b, :a], Y[:a], alpha=-1)
            Y[a:b] = inverse @ Y[a:b]
        for (a, b), inverse in reversed(bounds):
            if b < n:
                Y[a:b].addmm_(self._L[b:, a:b].T, Y[b:], alpha=-1)
            Y[a:b] = inverse.T @ Y[a:b]
        return Y


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
    """Clip the CLIPPED largest singular values of W (m, n) to the smallest of them, if `clip` and they stand out.

    The rounding error of W'W is a fixed share of the square of the largest singular value. Trained weights have a few
    singular values that are much larger than the others. Clipping them makes the rounding error smaller. The clipped
    directions are estimates, so the minor components of W M change a little; `Search._solve` takes M into account.

    An example: a weight has the singular values 1000, 2, 1, 0.5, ... In float32 the rounding errors of W'W are about
    6e-8 * 1000^2 = 0.06, the square of 0.25: smaller singular values are lost. Clipped at 2, the errors are about 2e-7,
    and singular values down to 5e-4 are visible.

    >>> W = torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    >>> W[:, 0] *= 100
    >>> flat = flatten(W, clip=True, generator=torch.Generator().manual_seed(0))
    >>> clipped = torch.linalg.svdvals(torch.cat(list(flat.rows(W.dtype))))
    >>> sigma = torch.linalg.svdvals(W)
    >>> [bool(value) for value in (sigma[0] > 2000, clipped[0] < 30, (clipped[-20:] / sigma[-20:]).min() > 0.97)]
    [True, True, True]
    """
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
