"""Gram matrices and their Cholesky factors, computed with matrix products: several times faster than LAPACK's.

Only the blocks on and below the diagonal are computed and read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

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
