"""Search a few singular triplets at one end of the spectrum, with a proven error bound (`tol`).

This is many times faster than a whole decomposition. Let H = W'W for minor components and H = -W'W for principal ones.
The wanted right singular vectors V (n, k) are then the eigenvectors of the lowest eigenvalues of H.

Why so elaborate: the smallest singular values of a trained weight lie close together and far below the largest. An
iteration with H itself finds them last. An iteration with the inverse of H finds them first, but W'W squares the
condition number of W, so its small eigenvalues are partly rounding. And no iteration shows that it has missed nothing.
Steps 2 and 3 prove that, and step 4 removes the rounding.

1. Block Lanczos on the inverse of H (or on -H) gives a first V, with a few columns more than the rank.
2. H + c V V' - t I is factored (Cholesky), with t just above the wanted eigenvalues. If this matrix is positive
   definite, V misses no eigenvalue below t: adding c V V' changes at most k eigenvalues (Weyl).
3. R = H V - V Theta is the residual. Z = (H + c V V' - t I)^-1 R corrects V to second order. Z also bounds the
   remaining error: on V, the eigenvalues of H are at least the eigenvalues of Theta - R'Z (a Schur complement);
   elsewhere they are at least t.
4. Theta and R are computed from W and not from the Gram matrix. Rounding in the Gram matrix then only makes the
   correction slower, and not the result less accurate.
5. `_polished` removes from V what rounding has left of strong directions, so that W V gives the left vectors too.

If the matrix of step 2 is not positive definite, V misses directions. The search then uses a lower t, and finds the
missing directions with block Lanczos on the inverse of the matrix that can be factored.

>>> W = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
>>> search = Search(W, float(W.norm()), 8, 1, W.dtype, torch.Generator().manual_seed(0), is_transposed=False)
>>> found = search.run(tol=1e-3)
>>> found.excess <= 1e-3, torch.allclose(found.S, torch.linalg.svdvals(W)[-8:], rtol=1e-3)
(True, True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_vl.core.svd.gram import BLOCK, cholesky, flatten, gram_matrix

EXTRA = 16  # columns of V beyond the rank: they separate t from the wanted eigenvalues
ROUNDS = 5  # the largest number of corrections
CONVERGED = 0.12  # stop Lanczos when a block changes the wanted energy by less; the correction does the rest
CLUSTERED = 0.1  # sharpen V if the first wanted eigenvalue is more than this share of the last
BASIS = 5  # the largest Lanczos basis, as a multiple of the columns of V
MISSING_BLOCKS = 4  # Lanczos blocks in the search for missing directions
WEAK = 256  # multiples of eps and sigma_max below which rounding spoils left vectors (3e-5 in float32)
SAFE = 1e-3  # share of sigma_max above which one pass of `_polished` is enough
LOST = 1e-3  # share of ||W||_F by which left vectors of zeros may miss W'U = V S
NOISE_LIMIT = 0.05  # largest rounding error of the Gram matrix, as a share of t


Factor = tuple[Tensor, float]  # L (n, n) of L L' = H + c V V' - t I, and t


@dataclass(frozen=True, slots=True)
class BoundedTriplets:
    """Singular triplets U (m, r), S (r,) descending, V (n, r), and the bound on their excess."""

    U: Tensor
    S: Tensor
    V: Tensor
    excess: float


@dataclass(frozen=True, slots=True)
class Space:
    """Ritz vectors V (n, k) of H, Y = W V (m, k) and Ritz values theta (k,), ascending (float64)."""

    V: Tensor
    Y: Tensor
    theta: Tensor


class Search:
    """A search for the lowest eigenvectors of H = sign * W'W of a tall W (m, n), with a Gram matrix in `dtype`."""

    def __init__(
        self,
        W: Tensor,
        norm: float,
        rank: int,
        sign: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        is_transposed: bool,
        refines_left: bool = True,
    ) -> None:
        """`norm` is ||W||_F; rank + EXTRA must be less than n.

        If W is the transpose of the user's weight, the triplets must satisfy W'U = V S rather than W V = U S.
        """
        self.is_transposed, self.refines_left = is_transposed, refines_left
        self.W, self.rank, self.sign, self.dtype, self.generator = W, rank, sign, dtype, generator
        self.keep = rank + EXTRA
        self.block = max(16, 3 * rank // 4)
        # Smaller differences are rounding and not an error of the subspace.
        self.norm, self.floor = norm, 4 * torch.finfo(W.dtype).eps * norm
        # Clipping is done in the precision of W, so with a more precise Gram matrix it would only add rounding.
        self.flat = flatten(W, sign > 0 and dtype == W.dtype, generator)

    def run(self, tol: float) -> BoundedTriplets | None:
        """Return triplets with an excess of at most `tol`, or None if this Gram matrix is not accurate enough."""
        self.G = gram_matrix(self.flat.rows(self.dtype), self.W.shape[1])
        # The rounding error of G is a share of its largest eigenvalue, for which there are two estimates: one is the
        # mean of the eigenvalues, weighted by themselves, ||G||_F^2 / trace G.
        mean = float(torch.linalg.vector_norm(self.G)) / max(float(self.G.diagonal().sum()), 1e-300) ** 0.5
        self.noise = 2 * torch.finfo(self.dtype).eps * max(self.flat.flat_max, mean) ** 2
        self.sigma_max = max(mean, self.flat.sigma_max) if len(self.flat.damping) else mean
        if self.sign < 0:
            self.G.neg_()
        self.plain: Factor | None = None  # of H plus a small multiple of I
        V = self._guess()
        if V is None:
            return None
        space = self._ritz(V)
        for _ in range(ROUNDS):
            energy = float(space.theta[: self.rank].sum())
            if self.sign > 0 and energy <= self.floor**2:
                return self._result(space, 0.0)
            if self.noise > NOISE_LIMIT * abs(float(space.theta[-1])):
                return None
            edge = _edge(space.theta[: self.rank], tol * abs(energy))
            lifted = self._factor_lifted(space, edge)
            if lifted is None:
                return None
            shift = lifted[1]
            R = self._residual(space)
            Z = self._solve(lifted, R)
            if shift < edge:  # not proven: some eigenvalue below `edge` has no vector in V
                space = self._ritz(torch.cat([space.V, Z, self._missing(lifted)], dim=1))
                continue
            low = self._lower_bound(space.theta, R, Z, shift)
            # V - Z is too long a step if V is inaccurate, and for principal components. The Ritz vectors in the span of
            # V and Z are then the best choice.
            both = torch.cat([space.V, Z], dim=1)
            corrected = self._rotated(space.V - Z) if self.sign > 0 else self._ritz(both)
            excess = self._excess(corrected.theta, low)
            if excess <= tol:
                return self._result(corrected, excess)
            space = self._ritz(both)
        return None

    def _result(self, space: Space, excess: float) -> BoundedTriplets | None:
        """Return the triplets of the space, or None if their vectors or their certified norm are lost in rounding."""
        Y, V = space.Y[:, : self.rank], space.V[:, : self.rank]
        before = float(torch.linalg.vector_norm(Y, dtype=torch.float64))
        smallest = float(space.theta[0].abs()) ** 0.5 / self.sigma_max
        is_weak = smallest <= WEAK * torch.finfo(self.W.dtype).eps
        is_polished = self.sign > 0 and self.refines_left and (is_weak or self.is_transposed)
        if is_polished:
            V = self._polished(V, 3 if is_weak else 2 if smallest < SAFE else 1)
            Y = product(self.W, V)
        U, S, V = triplets(Y, V)
        norms = [S]
        if self.refines_left and (is_polished or self.is_transposed):
            P = product(self.W.T, U)  # (n, r); V S, but for rounding
            if is_polished and float(torch.linalg.vector_norm(P - V * S)) > LOST * self.norm:
                return None
            if self.is_transposed:
                V, S, U = triplets(P, U)
                norms += [S, product(self.W, V)] if smallest < SAFE else [S]
        after = max(float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in norms)
        if after > before * (1 + 1e-6) + self.floor / 16:
            return None
        U, S, V = (each.to(self.W.dtype) for each in (U, S, V))
        return BoundedTriplets(U, S, V, excess)

    def _polished(self, V: Tensor, passes: int) -> Tensor:
        """Return V (n, r) in float64, without the share of strong directions that rounding has left in it.

        W V multiplies that share by the largest singular values, and hides the smallest. Inverse iteration removes it:
        its residual needs float64, its solutions do not.
        """
        assert self.plain is not None
        V = V.double()
        for _ in range(passes):
            P = product(self.W.T, product(self.W, V))
            Z = self._solve(self.plain, (P - V @ (V.T @ P)).to(self.W.dtype))
            V = torch.linalg.qr(V - Z).Q
        return V

    def _guess(self) -> Tensor | None:
        """Return a first V (n, keep), or None if H cannot be factored."""
        if self.sign < 0:
            return self._first(Lanczos(lambda X: self.W.T @ (self.W @ X), self._random()), lambda mu: -mu)
        factored = self._factor([-self.noise * 8**k for k in range(5)])
        if factored is None:
            return None
        self.plain, shift = factored if self.refines_left else None, factored[1]
        return self._first(Lanczos(lambda X: self._solve(factored, X), self._random()), lambda mu: 1 / mu + shift)

    def _first(self, lanczos: Lanczos, eigenvalues: Callable[[Tensor], Tensor]) -> Tensor:
        """Add Lanczos blocks until the energy of the wanted eigenvectors has nearly converged."""
        energy, is_clustered = 0.0, False
        while lanczos.size + self.block <= min(len(lanczos.Q), BASIS * self.keep):
            lanczos.step()
            if lanczos.size < self.keep:
                continue
            theta = eigenvalues(lanczos.values(self.rank)).abs()
            if self.noise > NOISE_LIMIT * float(theta.max()):  # Ritz values are upper bounds, so this cannot improve
                return lanczos.ritz(self.keep)[1]
            is_clustered = float(theta.min()) > CLUSTERED * float(theta.max())
            last, energy = energy, float(theta.sum())
            if abs(energy - last) < CONVERGED * energy:
                break
        mu, V = lanczos.ritz(self.keep)
        return self._sharpen(V, eigenvalues(mu)) if is_clustered else V

    def _sharpen(self, V: Tensor, theta: Tensor) -> Tensor:
        """Return V after three Lanczos steps on the inverse of H - s I, with s just below the first eigenvalue.

        This shift separates clustered eigenvalues.
        """
        first, width = float(theta[0]), float(theta[self.rank - 1] - theta[0])
        factored = self._factor([first - width / 8, first - width / 2, first - 2 * width])
        if factored is None:
            return V
        V, _ = torch.linalg.qr(V)
        lanczos = Lanczos(lambda X: self._solve(factored, X), V)
        for _ in range(min(3, len(V) // self.keep)):
            lanczos.step()
        return lanczos.ritz(self.keep)[1]

    def _factor_lifted(self, space: Space, edge: float) -> Factor | None:
        """Factor H + c V V' - t I at the largest t possible. A t of at least `edge` proves that V is complete."""
        first, last = float(space.theta[0]), float(space.theta[-1])
        width = edge - first
        shifts = [(edge + last) / 2, edge, first + width / 2, first + width / 8, first - width / 8, first - width]
        return self._factor(shifts, space.V, 4 * max(abs(first), abs(last)))

    def _factor(self, shifts: Sequence[float], V: Tensor | None = None, lift: float = 0.0) -> Factor | None:
        """Return the factor at the first shift that is possible, and that shift."""
        lifted = None if V is None else self.flat.scale(V).to(self.dtype)
        factors = ((cholesky(self.G, shift, lifted, lift), shift) for shift in shifts)
        return next(((L, shift) for L, shift in factors if L is not None), None)

    def _solve(self, factor: Factor, X: Tensor) -> Tensor:
        """Return (H + c V V' - t M^-2)^-1 X for X (n, b), with the M of `flatten`.

        Since M <= I, this inverse is at least the one with t I, so the bound of step 3 holds for it too.
        """
        L, Y = factor[0], self.flat.scale(X).to(self.dtype)
        Y = torch.linalg.solve_triangular(L.mT, torch.linalg.solve_triangular(L, Y, upper=False), upper=True)
        return self.flat.scale(Y.to(self.W.dtype))

    def _ritz(self, basis: Tensor) -> Space:
        """Return the lowest Ritz pairs of H in the span of `basis` (n, at least keep)."""
        return self._rotated(torch.linalg.qr(basis).Q)

    def _rotated(self, basis: Tensor) -> Space:
        """Return the lowest Ritz pairs of H in the span of a well-conditioned basis (n, k), orthonormal to rounding."""
        Y = self.W @ basis
        lengths, products = basis.double(), Y.double()
        # With L L' = B'B the columns of B L^-T are orthonormal.
        L = torch.linalg.cholesky(lengths.T @ lengths)
        half = torch.linalg.solve_triangular(L, products.T @ products, upper=False)
        theta, vectors = torch.linalg.eigh(self.sign * torch.linalg.solve_triangular(L, half.T, upper=False))
        rotation = torch.linalg.solve_triangular(L.T, vectors[:, : self.keep], upper=True).to(basis.dtype)
        return Space(basis @ rotation, Y @ rotation, theta[: self.keep])

    def _residual(self, space: Space) -> Tensor:
        """Return R = H V - V Theta (n, k). Its component in the span of V is rounding, and is removed."""
        R = self.sign * (self.W.T @ space.Y)
        R -= space.V @ (space.V.T @ R)
        return R

    def _lower_bound(self, theta: Tensor, R: Tensor, Z: Tensor, shift: float) -> float:
        """Return a lower bound of the sum of the `rank` lowest eigenvalues of H (step 3)."""
        correction = R.double().T @ Z.double()
        values = torch.linalg.eigvalsh(torch.diag(theta) - (correction + correction.T) / 2)
        return float(values[: self.rank].clamp(max=shift - self.noise).sum())

    def _excess(self, theta: Tensor, low: float) -> float:
        """Return a bound on the relative error of the norm of the singular values."""
        upper = float(theta[: self.rank].sum())  # Ritz values are upper bounds of the eigenvalues
        larger, smaller = (upper, low) if self.sign > 0 else (-low, -upper)
        larger, smaller = max(larger, 0.0) ** 0.5, max(smaller, 0.0) ** 0.5
        if larger - smaller <= self.floor:
            return 0.0
        return larger / smaller - 1 if smaller > 0 else float("inf")

    def _missing(self, factor: Factor) -> Tensor:
        """Return the lowest eigenvectors that V does not contain, from a random start."""
        lanczos = Lanczos(lambda X: self._solve(factor, X), self._random())
        for _ in range(min(MISSING_BLOCKS, len(lanczos.Q) // self.block)):
            lanczos.step()
        return lanczos.ritz(self.keep)[1]

    def _random(self) -> Tensor:
        shape = self.W.shape[1], self.block
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return drawn.to(self.W)


def triplets(Y: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,) descending and V (n, k) of W on the span of V (n, k), given Y = W V (m, k).

    The columns of V are orthonormal.

    >>> W = torch.diag(torch.tensor([3.0, 1.0]))
    >>> triplets(W, torch.eye(2))[1]
    tensor([3., 1.])
    """
    Q, R = torch.linalg.qr(Y)
    U, S, Vh = torch.linalg.svd(R)
    return Q @ U, S, V @ Vh.T


def product(W: Tensor, X: Tensor) -> Tensor:
    """Return W X in the dtype of X: rows of W are converted in blocks that stay in the cache."""
    return torch.cat([rows.to(X.dtype) @ X for rows in W.split(BLOCK)])


def _edge(theta: Tensor, allowance: float) -> float:
    """Return the t with sum(max(theta - t, 0)) = allowance, for theta (k,) ascending.

    The bound of step 3 counts every eigenvalue above t as t; this t makes that loss equal to the allowance.
    """
    descending = theta.flip(0)
    counts = torch.arange(1, len(theta) + 1, dtype=theta.dtype, device=theta.device)
    candidates = (descending.cumsum(0) - allowance) / counts
    below = torch.cat([descending[1:], descending.new_tensor([-torch.inf])])
    return float(candidates[int((candidates >= below).nonzero()[0])])


class Lanczos:
    """Block Lanczos with full reorthogonalization: the largest eigenvalues of a symmetric operator H.

    Q (n, k) is a growing orthonormal basis, T = Q' H Q (k, k, float64).

    >>> H = torch.diag(torch.arange(1.0, 41.0))
    >>> lanczos = Lanczos(lambda X: H @ X, torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
    >>> for _ in range(8):
    ...     lanczos.step()
    >>> [round(value, 1) for value in lanczos.values(2).tolist()]
    [40.0, 39.0]
    """

    def __init__(self, apply: Callable[[Tensor], Tensor], start: Tensor) -> None:
        """`apply` multiplies (n, b) by H; `start` (n, b) has full rank."""
        self._apply = apply
        self.Q, self._products = start[:, :0], start[:, :0]
        self.T = start.new_zeros(0, 0, dtype=torch.float64)
        self._next = start

    @property
    def size(self) -> int:
        return self.Q.shape[1]

    def step(self) -> None:
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
