"""Block Lanczos with full reorthogonalization: the eigenvectors of the largest eigenvalues of a symmetric operator.

>>> H = torch.diag(torch.arange(1.0, 41.0))
>>> lanczos = Lanczos(lambda X: H @ X, torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
>>> for _ in range(8):
...     lanczos.step()
>>> [round(value, 1) for value in lanczos.values(2).tolist()]
[40.0, 39.0]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Lanczos:
    """A growing orthonormal basis Q (n, k) and T = Q' H Q (k, k, float64) of a symmetric operator H."""

    def __init__(self, apply: Callable[[Tensor], Tensor], start: Tensor) -> None:
        """`apply` multiplies (n, b) by H; `start` (n, b) has full rank."""
        self._apply = apply
        self.Q, self._products = start[:, :0], start[:, :0]
        self.T = start.new_zeros(0, 0, dtype=torch.float64)
        self._next = start

    @property
    def size(self) -> int:
        """Return the number of columns of the basis."""
        return self.Q.shape[1]

    def step(self) -> None:
        """Add a block to the basis."""
        # The block was projected once when its product entered T. Twice is enough (Parlett: The Symmetric Eigenvalue
        # Problem, section 6.9).
        new, _ = torch.linalg.qr(self._next - self.Q @ (self.Q.T @ self._next))
        self.Q = torch.cat([self.Q, new], dim=1)
        product = self._apply(new)
        self._products = torch.cat([self._products, product], dim=1)
        columns = self.Q.T @ product
        self._next = product - self.Q @ columns
        k, b = columns.shape
        T = self.T.new_zeros(k, k)
        T[: k - b, : k - b] = self.T
        T[:, k - b :] = columns
        T[k - b :, : k - b] = columns[: k - b].T
        T[k - b :, k - b :] = (columns[k - b :] + columns[k - b :].T) / 2
        self.T = T

    def values(self, count: int) -> Tensor:
        """Return the largest Ritz values, descending (float64)."""
        return torch.linalg.eigvalsh(self.T).flip(0)[:count]

    def ritz(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the largest Ritz values, descending, and H times their Ritz vectors (n, count), normalized.

        Multiplying by H is one more step of subspace iteration, and it removes rounding errors of the last blocks. The
        products are available anyway.
        """
        values, rotation = torch.linalg.eigh(self.T)
        vectors = self._products @ rotation.flip(1)[:, :count].to(self.Q.dtype)
        return values.flip(0)[:count], vectors / torch.linalg.vector_norm(vectors, dim=0)
