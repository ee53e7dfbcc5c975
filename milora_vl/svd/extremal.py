"""A few singular triplets at one end of a spectrum, with a proof, many times faster than a whole decomposition.

Everything is done for H = W'W (minor components) or H = -W'W (principal ones), whose lowest eigenvectors V are wanted.

1. Block Lanczos, on the inverse of H or on -H, finds a first V of a few more columns than asked for.
2. H + c V V' - t I is factored (Cholesky), t just above the wanted eigenvalues. That this matrix is positive definite
   proves that no eigenvalue below t is missing from V (Weyl).
3. Its inverse times the residual, Z = (H + c V V' - t I)^-1 R with R = H V - V Theta, corrects V to second order and
   bounds what V may still lose: on V the eigenvalues of H lie above those of Theta - R'Z (a Schur complement),
   elsewhere above t.
4. Theta and R come from W itself, never from the Gram matrix: rounding in that slows the correction, no more.

Where the matrix of step 2 is not positive definite, V misses directions. Then a lower t is taken, and block Lanczos on
the inverse of what can be factored finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_vl.svd.cholesky import Cholesky, lower_gram, mean_eigenvalue
from milora_vl.svd.flatten import flatten
from milora_vl.svd.lanczos import Lanczos
from milora_vl.svd.triplets import Inverse, refine_left_vectors, transpose, triplets

EXTRA = 16  # columns of V beyond the rank: they keep t clear of the wanted eigenvalues
ROUNDS = 5
SETTLED = 0.12  # relative change of the wanted energy by one Lanczos block: the correction does the rest
CROWDED = 0.1  # ratio of the first to the last wanted eigenvalue above which they need more than that
BASIS = 5  # times the columns of V: the largest first basis
MISSING_BLOCKS = 4
SAFE = 1e-4  # of the largest singular value: where left vectors are corrected with care
NOISE_LIMIT = 0.05  # of t: above it the Gram matrix is too coarse in its dtype


@dataclass(frozen=True, slots=True)
class Found:
    """Singular triplets U (m, r), S (r,) descending, V (n, r), and the bound of their excess."""

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
    """The lowest eigenvectors of H = sign * W'W for a tall W (m, n), through a Gram matrix in `dtype`."""

    def __init__(
        self,
        W: Tensor,
        norm: float,
        rank: int,
        sign: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        is_mirrored: bool,
    ) -> None:
        """`norm` is ||W||_F; rank + EXTRA must be less than n. Of a mirrored W, W'U = V S shall hold, not W V = U S."""
        self.is_mirrored = is_mirrored
        self.W, self.rank, self.sign, self.dtype, self.generator = W, rank, sign, dtype, generator
        self.keep = rank + EXTRA
        self.block = max(16, 3 * rank // 4)
        # Differences below it are rounding, not an error of the subspace.
        self.norm, self.floor = norm, 4 * torch.finfo(W.dtype).eps * norm
        # In a higher precision than W's own, clipping in W's would only add rounding.
        self.flat = flatten(W, sign > 0 and dtype == W.dtype, generator)

    def run(self, tol: float) -> Found | None:
        """Return triplets with an excess of at most `tol`; None where this Gram matrix does not lead there."""
        self.G = lower_gram(self.flat.rows(self.dtype), self.W.shape[1])
        # Rounding in G is a share of its largest eigenvalue, for which there are two estimates.
        mean = mean_eigenvalue(self.G) ** 0.5
        self.noise = 2 * torch.finfo(self.dtype).eps * max(self.flat.flat_max, mean) ** 2
        self.sigma_max = max(mean, self.flat.sigma_max) if len(self.flat.damping) else mean
        if self.sign < 0:
            self.G.neg_()
        self.out = torch.empty_like(self.G)
        self.newest: tuple[Cholesky, float] | None = None
        self.plain: tuple[Cholesky, float] | None = None  # the first one, next to H itself
        V = self._guess()
        if V is None:
            return None
        space = self._ritz(V)
        for _ in range(ROUNDS):
            energy = float(space.theta[: self.rank].sum())
            if self.sign > 0 and energy <= self.floor**2:
                return self._found(space, 0.0)
            if self.noise > NOISE_LIMIT * abs(float(space.theta[-1])):
                return None
            edge = _edge(space.theta[: self.rank], tol * abs(energy))
            lifted = self._factor_lifted(space, edge)
            if lifted is None:
                return None
            factor, shift = lifted
            R = self._residual(space)
            Z = self._solve(factor, R)
            if shift < edge:
                space = self._ritz(torch.cat([space.V, Z, self._missing(factor)], dim=1))
                continue
            low = self._lower_bound(space.theta, R, Z, shift)
            # The step is too long where V is far off and towards the weak end of -W'W: there the best of V and Z is.
            both = torch.cat([space.V, Z], dim=1)
            corrected = self._rotated(space.V - Z) if self.sign > 0 else self._ritz(both)
            excess = self._excess(corrected.theta, low)
            if excess <= tol:
                return self._found(corrected, excess)
            space = self._ritz(both)
        return None

    def _found(self, space: Space, excess: float) -> Found | None:
        """Triplets of the space; None where they do not come out as certified."""
        U, S, V = triplets(space.Y[:, : self.rank], space.V[:, : self.rank])
        made: tuple[Tensor, Tensor, Tensor] | None = U, S, V
        if self.sign > 0:
            made = self._with_left_vectors(U, S, V)
        elif self.is_mirrored:
            made = transpose(self.W, U, V, None, self.floor)
        if made is None:
            return None
        before, after = (float(torch.linalg.vector_norm(s, dtype=torch.float64)) for s in (S, made[1]))
        return Found(*made, excess) if abs(after - before) <= self.floor + 1e-6 * before else None

    def _with_left_vectors(self, U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Take out of U what rounding put in, with the factor at hand, or a safe one where S is next to nothing."""
        inverse, near = self._inverse(self.newest, is_safe=False), self._inverse(self.plain, is_safe=True)
        clean = None
        safe = max(self.noise, (SAFE * self.sigma_max) ** 2)
        if inverse is not None and self.newest is not None and self.newest[1] >= safe:
            clean = refine_left_vectors(self.W, U, S, V, self.sigma_max, inverse, self.generator)
        if clean is None:
            near = self._inverse(self._factor([-safe * 8**k for k in range(5)]), is_safe=True)
            if near is None:
                return None
            clean = refine_left_vectors(self.W, U, S, V, self.sigma_max, near, self.generator)
            assert clean is not None
            if float(torch.linalg.vector_norm(self.W.T @ clean - V * S)) > 0.01 * self.norm:
                return None
        if self.is_mirrored:
            return transpose(self.W, clean, V, near, self.floor) if near is not None else None
        return clean, S, V

    def _inverse(self, made: tuple[Cholesky, float] | None, *, is_safe: bool) -> Inverse | None:
        return None if made is None else Inverse(lambda P: self._solve(made[0], P), is_safe)

    def _guess(self) -> Tensor | None:
        """A first V (n, keep)."""
        if self.sign < 0:
            return self._first(Lanczos(lambda X: self.W.T @ (self.W @ X), self._random()), lambda mu: -mu)
        made = self._factor([-self.noise * 8**k for k in range(5)])
        if made is None:
            return None
        factor, shift = made
        if self.is_mirrored:
            self.plain, self.out = made, torch.empty_like(self.G)
        return self._first(Lanczos(lambda X: self._solve(factor, X), self._random()), lambda mu: 1 / mu + shift)

    def _first(self, lanczos: Lanczos, eigenvalues: Callable[[Tensor], Tensor]) -> Tensor:
        """Add blocks until the energy of the wanted eigenvectors has nearly settled."""
        energy, crowded = 0.0, False
        while lanczos.size + self.block <= min(len(lanczos.Q), BASIS * self.keep):
            lanczos.step()
            if lanczos.size < self.keep:
                continue
            theta = eigenvalues(lanczos.values(self.rank)).abs()
            if self.noise > NOISE_LIMIT * float(theta.max()):  # these are upper bounds: it will not get better
                return lanczos.ritz(self.keep)[1]
            crowded = float(theta.min()) > CROWDED * float(theta.max())
            last, energy = energy, float(theta.sum())
            if abs(energy - last) < SETTLED * energy:
                break
        mu, V = lanczos.ritz(self.keep)
        return self._sharpen(V, eigenvalues(mu)) if crowded else V

    def _sharpen(self, V: Tensor, theta: Tensor) -> Tensor:
        """Three steps with the inverse of H - s I, s just below its first: there crowded ones stand apart."""
        first, width = float(theta[0]), float(theta[self.rank - 1] - theta[0])
        made = self._factor([first - width / 8, first - width / 2, first - 2 * width])
        if made is None:
            return V
        V, _ = torch.linalg.qr(V)
        lanczos = Lanczos(lambda X: self._solve(made[0], X), V)
        for _ in range(min(3, len(V) // self.keep)):
            lanczos.step()
        return lanczos.ritz(self.keep)[1]

    def _factor_lifted(self, space: Space, edge: float) -> tuple[Cholesky, float] | None:
        """Factor H + c V V' - t I at the largest t that works; from `edge` on it proves that V is complete."""
        first, last = float(space.theta[0]), float(space.theta[-1])
        width = edge - first
        shifts = [(edge + last) / 2, edge, first + width / 2, first + width / 8, first - width / 8, first - width]
        return self._factor(shifts, space.V, 4 * max(abs(first), abs(last)))

    def _factor(
        self, shifts: Sequence[float], V: Tensor | None = None, lift: float = 0.0
    ) -> tuple[Cholesky, float] | None:
        """The factor at the first shift that works, and that shift; it is made where the one before it was."""
        lifted = None if V is None else self.flat.scale(V).to(self.dtype)
        for shift in shifts:
            factor = Cholesky.of(self.G, self.out, shift, lifted, lift)
            self.newest = None if factor is None else (factor, shift)
            if self.newest is not None:
                return self.newest
        return None

    def _solve(self, factor: Cholesky, X: Tensor) -> Tensor:
        """The inverse of H + c V V' - t M^-2 times X (n, b).

        M <= I, see `flatten`: it is at least the inverse with t I, so the bound of step 3 holds with it, too.
        """
        return self.flat.scale(factor.solve(self.flat.scale(X).to(self.dtype)).to(self.W.dtype))

    def _ritz(self, basis: Tensor) -> Space:
        """The lowest Ritz pairs of H in the span of `basis` (n, at least keep)."""
        return self._rotated(torch.linalg.qr(basis).Q)

    def _rotated(self, basis: Tensor) -> Space:
        """The lowest Ritz pairs of H in the span of a well-conditioned basis (n, k), orthonormal to rounding."""
        Y = self.W @ basis
        lengths, products = basis.double(), Y.double()
        # With L L' = B'B the columns of B L^-T are orthonormal.
        L = torch.linalg.cholesky(lengths.T @ lengths)
        half = torch.linalg.solve_triangular(L, products.T @ products, upper=False)
        theta, vectors = torch.linalg.eigh(self.sign * torch.linalg.solve_triangular(L, half.T, upper=False))
        rotation = torch.linalg.solve_triangular(L.T, vectors[:, : self.keep], upper=True).to(basis.dtype)
        return Space(basis @ rotation, Y @ rotation, theta[: self.keep])

    def _residual(self, space: Space) -> Tensor:
        """H V - V Theta (n, k); what of it lies in the span of V is rounding."""
        R = self.sign * (self.W.T @ space.Y)
        R -= space.V @ (space.V.T @ R)
        return R

    def _lower_bound(self, theta: Tensor, R: Tensor, Z: Tensor, shift: float) -> float:
        """What the sum of the `rank` lowest eigenvalues of H is at least."""
        correction = R.double().T @ Z.double()
        values = torch.linalg.eigvalsh(torch.diag(theta) - (correction + correction.T) / 2)
        return float(values[: self.rank].clamp(max=shift - self.noise).sum())

    def _excess(self, theta: Tensor, low: float) -> float:
        """How far the norm of the found singular values can be from that of the true ones, relative."""
        found = float(theta[: self.rank].sum())
        larger, smaller = (found, low) if self.sign > 0 else (-low, -found)
        larger, smaller = max(larger, 0.0) ** 0.5, max(smaller, 0.0) ** 0.5
        if larger - smaller <= self.floor:
            return 0.0
        return larger / smaller - 1 if smaller > 0 else float("inf")

    def _missing(self, factor: Cholesky) -> Tensor:
        """The lowest eigenvectors that V does not hold, from a random start."""
        lanczos = Lanczos(lambda X: self._solve(factor, X), self._random())
        for _ in range(min(MISSING_BLOCKS, len(lanczos.Q) // self.block)):
            lanczos.step()
        return lanczos.ritz(self.keep)[1]

    def _random(self) -> Tensor:
        shape = self.W.shape[1], self.block
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return drawn.to(self.W)


def _edge(theta: Tensor, allowance: float) -> float:
    """The t with sum(max(theta - t, 0)) = allowance: what is lost if all eigenvalues above t counted as t."""
    descending = theta.flip(0)
    counts = torch.arange(1, len(theta) + 1, dtype=theta.dtype, device=theta.device)
    candidates = (descending.cumsum(0) - allowance) / counts
    below = torch.cat([descending[1:], descending.new_tensor([-torch.inf])])
    return float(candidates[int((candidates >= below).nonzero()[0])])
