"""Gram matrices W'W in true float32, their Cholesky factors, and W with clipped singular values (`flatten`)."""

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


BLOCK = 256  # of a Gram matrix; a block that the diagonal cuts is computed as a whole


def gram_matrix(rows: Iterable[Tensor], n: int) -> Tensor:
    """Return the sum of C'C (n, n) over the row chunks C (k, n)."""
    G: Tensor | None = None
    for chunk in rows:
        G = chunk.new_zeros(n, n) if G is None else G
        add_to_lower(G, chunk)
    assert G is not None
    return mirror(G)


def add_to_lower(G: Tensor, C: Tensor) -> None:
    """Add C'C for C (k, n) to the entries of G (n, n) on and below the diagonal, with half of the work of a product.

    Halving the triangle makes most of the work one large square product. Some entries above the diagonal change too;
    `mirror` replaces them.

    >>> G = torch.zeros(3, 3)
    >>> add_to_lower(G, torch.tensor([[1.0, 2.0, 3.0]]))
    >>> mirror(G)[0]
    tensor([1., 2., 3.])
    """
    if len(G) <= BLOCK:
        G.addmm_(C.T, C)
        return
    middle = -(-len(G) // (2 * BLOCK)) * BLOCK
    add_to_lower(G[:middle, :middle], C[:, :middle])
    add_to_lower(G[middle:, middle:], C[:, middle:])
    G[middle:, :middle].addmm_(C[:, middle:].T, C[:, :middle])


def mirror(G: Tensor) -> Tensor:
    """Fill the entries of G (n, n) above its diagonal blocks with those below, in place, and return it."""
    for start in range(BLOCK, len(G), BLOCK):
        block = slice(start, start + BLOCK)
        G[:start, block] = G[block, :start].T
    return G


def cholesky(G: Tensor, shift: float, V: Tensor | None = None, lift: float = 0.0) -> Tensor | None:
    """Return the L (n, n) of L L' = G + lift V V' - shift I, or None if this matrix is not positive definite.

    G (n, n) is not changed, and only the entries on and below its diagonal count; V is (n, k) or None.

    >>> cholesky(torch.tensor([[4.0, 0.0], [2.0, 3.0]]), shift=1.0).round(decimals=2)  # of [[3, 2], [2, 2]]
    tensor([[1.7300, 0.0000],
            [1.1500, 0.8200]])
    >>> cholesky(torch.eye(2), shift=2.0) is None  # 1 - 2 < 0
    True
    """
    A = G.clone()
    if V is not None:
        add_to_lower(A, (V * lift**0.5).T)
    A.diagonal().sub_(shift)
    L, failed = torch.linalg.cholesky_ex(A)
    is_finite = torch.isfinite(L.diagonal()).all()
    return None if failed.item() or not is_finite else L  # None: an eigenvalue is at most `shift`


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
        """Yield W M in chunks of rows (k, n), in `dtype`."""
        is_clipped = len(self.damping) > 0
        size = ROWS if is_clipped or dtype != self.W.dtype else len(self.W)
        for start in range(0, len(self.W), size):
            W = self.W[start : start + size]
            yield torch.addmm(W, self.U[start : start + size], self.V.T, alpha=-1) if is_clipped else W.to(dtype)


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
