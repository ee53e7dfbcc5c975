"""The measures of an analysis: cases done by hand, closed forms, and what holds of every matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milora_vl.analyze import measures
from milora_vl.analyze.measures import Update
from milora_vl.core.svd import decompose

SHAPES = st.tuples(st.integers(3, 12), st.integers(3, 12))
SEEDS = st.integers(0, 2**31)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(SHAPES, SEEDS, st.floats(0.1, 9), st.sampled_from(["minor", "principal"]))
def test_amplification_of_a_scaled_part_is_its_scale(shape: tuple[int, int], seed: int, c: float, part: str) -> None:
    """dW = c W_part: U and V are W's own, so that ||U'dWV|| = c ||W_part|| and the factor is c, whatever the part."""
    W = randn(*shape, seed=seed)
    f = decompose(W, 2, part)
    update = Update.from_factors(c * f.U * f.S, f.Vh)
    of_update, of_base = measures.amplification(W, update, 2)
    held = float(f.S.square().sum().sqrt())
    assert (of_update, of_base) == (pytest.approx(c * held, rel=1e-6), pytest.approx(held, rel=1e-6))
    whole = decompose(W, min(shape), "principal")
    top, bottom, rest = measures.similarities(whole, update, 2)
    assert (bottom if part == "minor" else top) == pytest.approx(1, abs=1e-6)
    assert rest == pytest.approx(2 / min(shape), rel=1e-6)  # the subspace lies within W's columns


def test_the_formula_of_the_definition() -> None:
    """Against ||U'dWV||/||U'WV|| as written, with full decompositions."""
    W, change = randn(9, 6), randn(9, 6, seed=3)
    U, _, Vh = torch.linalg.svd(change, full_matrices=False)
    expected = [float(torch.linalg.norm(U[:, :3].T @ M @ Vh[:3].T)) for M in (change, W)]
    assert measures.amplification(W, Update.from_matrix(change, 3), 3) == pytest.approx(tuple(expected))


def test_the_papers_random_column_is_the_expectation() -> None:
    """Table of method: q_proj 1.50, down_proj 1.17 of LLaMA2-7B at r = 64; a draw here agrees within its noise."""
    assert measures.expected_inside(97.36, (4096, 4096), 64) == pytest.approx(1.50, rel=0.03)
    assert measures.expected_inside(123.0, (4096, 11008), 64) == pytest.approx(1.17, rel=0.03)
    W = randn(200, 150)
    U, V = (torch.linalg.qr(randn(n, 40, seed=n)).Q for n in (200, 150))
    drawn = float(torch.linalg.norm(U.T @ W @ V))
    assert drawn == pytest.approx(measures.expected_inside(float(torch.linalg.norm(W)), (200, 150), 40), rel=0.1)


def similarity(A: Tensor, B: Tensor) -> float:
    """||A'B||_F^2 / r of column-orthonormal A, B (d, r)."""
    return float((A.T @ B).square().sum()) / A.shape[1]


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_similarities_are_those_of_the_definition(shape: tuple[int, int]) -> None:
    W, r = randn(*shape), 2
    whole = decompose(W, min(shape), "principal")
    update = Update.from_factors(randn(shape[0], 3, seed=1), randn(3, shape[1], seed=2))
    top, bottom, rest = measures.similarities(whole, update, r)
    U = torch.linalg.svd(W, full_matrices=False).U
    own = update.U[:, :r].double()
    U = U.double()
    assert top == pytest.approx(similarity(own, U[:, :r]), rel=1e-6)
    assert bottom == pytest.approx(similarity(own, U[:, -r:]), rel=1e-6)
    draws = torch.Generator().manual_seed(0)
    picked = [U[:, torch.randperm(U.shape[1], generator=draws)[:r]] for _ in range(3000)]
    assert rest == pytest.approx(sum(similarity(own, P) for P in picked) / 3000, rel=0.05)


def test_an_intruder_is_a_direction_that_was_not_there() -> None:
    """W diagonal: a strong update along (e1 + ... + e8)/sqrt(8) has a cosine of 0.35 with every vector of W."""
    W = torch.diag(torch.arange(8, 0, -1).double())
    whole = decompose(W, 8, "principal")
    new = torch.full((8, 1), 1 / math.sqrt(8), dtype=torch.float64)
    tuned = decompose(W + 100 * new @ new.T, 3, "principal")
    assert measures.intruders(whole, tuned.U[:, :1]) == 1
    assert measures.intruders(whole, tuned.U[:, :1], epsilon=0.3) == 0
    assert measures.intruders(whole, decompose(3 * W, 8, "principal").U) == 0


def test_factors_and_matrix_give_the_same_update() -> None:
    B, A = randn(7, 3), randn(3, 9, seed=1)
    low, whole = Update.from_factors(B, A), Update.from_matrix(B @ A, 5)
    assert (len(low.S), len(whole.S)) == (3, 3)
    torch.testing.assert_close(low.S, whole.S)
    torch.testing.assert_close(low.U * low.S @ low.Vh, B @ A)
    assert Update.from_factors(torch.zeros(4, 2), randn(2, 4)).S.numel() == 0
    assert measures.moved(A, A) == pytest.approx(1)
    assert measures.moved(A, torch.zeros(3)) is None


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 3), st.integers(8, 200), st.floats(0.01, 100))
def test_a_power_law_has_its_exponent(a: float, count: int, scale: float) -> None:
    sigma = scale * torch.arange(1, count + 1).double() ** -a
    found = measures.decay_exponent(sigma)
    assert found == pytest.approx(a, rel=1e-6)
    assert measures.condition_number(sigma) == pytest.approx(count**a, rel=1e-6) or count**a > 1e7


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=20), st.floats(0.01, 100))
def test_ranks_count_directions(values: list[float], scale: float) -> None:
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assert 1 - 1e-9 <= measures.stable_rank(sigma) <= len(values) + 1e-9
    assert 1 - 1e-9 <= measures.effective_rank(sigma) <= len(values) + 1e-9
    assert measures.effective_rank(scale * sigma) == pytest.approx(measures.effective_rank(sigma))
    shares = [measures.minor_energy(sigma, r) for r in range(len(values) + 1)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, pytest.approx(1))


def test_spectra_by_hand() -> None:
    flat, falling = torch.ones(5), torch.tensor([3.0, 0.0])
    assert (measures.effective_rank(flat), measures.stable_rank(flat)) == (pytest.approx(5), 5)
    assert (measures.effective_rank(falling), measures.condition_number(falling)) == (1, None)
    assert measures.effective_rank(torch.zeros(3)) == measures.stable_rank(torch.zeros(3)) == 0
    assert measures.decay_exponent(falling) is None
