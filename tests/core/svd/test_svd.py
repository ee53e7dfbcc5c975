from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milora_vl.core.svd import decompose

PARTS = ("minor", "principal", "random")


def matrix(rows: int, columns: int, seed: int, spectrum: str = "gaussian") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    if spectrum == "gaussian":
        return W
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    index = torch.arange(S.numel(), dtype=torch.float32)
    S = {"decaying": torch.exp(-index / 2), "degenerate": torch.ones_like(S), "zeros": (index < 1).float()}[spectrum]
    return U * S @ Vh


shapes = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 99))
spectra = st.sampled_from(["gaussian", "decaying", "degenerate", "zeros"])


@settings(max_examples=60, deadline=None)
@given(shapes, spectra, st.sampled_from(PARTS), st.data())
def test_factors_are_singular_triplets_of_the_weight(shape, spectrum, part, data) -> None:
    rows, columns, seed = shape
    W = matrix(rows, columns, seed, spectrum)
    rank = data.draw(st.integers(1, min(rows, columns)))
    f = decompose(W, rank, part)
    eye = torch.eye(rank)
    assert torch.allclose(f.U.T @ f.U, eye, atol=1e-5)
    assert torch.allclose(f.Vh @ f.Vh.T, eye, atol=1e-5)
    assert torch.allclose(W @ f.Vh.T, f.U * f.S, atol=2e-5)
    assert (f.S[:-1] >= f.S[1:]).all()
    assert f.excess == 0.0
    assert len(f.index) == rank
    assert f.norm == pytest.approx(float(W.norm()), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_minor_and_principal_part_make_up_the_weight(shape, data) -> None:
    rows, columns, seed = shape
    W = matrix(rows, columns, seed)
    full = min(rows, columns)
    rank = data.draw(st.integers(1, full))
    parts = [decompose(W, rank, "minor")]
    if rank < full:
        parts.append(decompose(W, full - rank, "principal"))
    assert torch.allclose(sum((f.U * f.S) @ f.Vh for f in parts), W, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0.01, 100), st.sampled_from(PARTS))
def test_lora_factors_multiply_to_the_part_at_any_scaling(shape, scaling, part) -> None:
    W = matrix(*shape)
    f = decompose(W, 1, part)
    A, B = f.lora(scaling)
    assert A.shape == (1, W.shape[1])
    assert B.shape == (W.shape[0], 1)
    assert A.is_contiguous()
    assert B.is_contiguous()
    assert torch.allclose(scaling * B @ A, (f.U * f.S) @ f.Vh, atol=1e-5 * float(f.S.max() + 1))
    assert torch.isclose(A.norm(), B.norm(), rtol=1e-4)


def test_minor_are_the_last_and_principal_the_first() -> None:
    W = torch.diag(torch.tensor([4.0, 1.0, 3.0, 2.0]))
    assert decompose(W, 2).S.tolist() == [2.0, 1.0]
    assert decompose(W, 2, "principal").S.tolist() == [4.0, 3.0]


def test_random_components_repeat_with_the_generator_and_never_within_a_draw() -> None:
    W = matrix(30, 40, 0)
    draws = [decompose(W, 20, "random", generator=torch.Generator().manual_seed(s)).index.tolist() for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 20
    assert draws[0] == sorted(draws[0])
    assert torch.equal(decompose(W, 3, "random").index, decompose(W, 3, "random").index)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (1, 6), (6, 1)])
def test_the_largest_entry_of_each_right_vector_is_positive(shape: tuple[int, int]) -> None:
    W = matrix(*shape, seed=3)
    f, g = decompose(W, min(shape)), decompose(-W, min(shape))
    for row in f.Vh:
        assert row[row.abs().argmax()] > 0
    assert torch.allclose(f.Vh, g.Vh, atol=1e-5)
    assert torch.allclose(f.U, -g.U, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_works_in_float32_and_keeps_float64(dtype: torch.dtype, expected: torch.dtype) -> None:
    W = matrix(6, 4, 0).to(dtype)
    f = decompose(W, 2)
    assert {f.U.dtype, f.S.dtype, f.Vh.dtype} == {expected}
    assert torch.allclose(W.to(expected) @ f.Vh.T, f.U * f.S, atol=1e-6)


def test_the_weight_is_left_alone_and_gradients_do_not_flow() -> None:
    W = matrix(6, 4, 0).requires_grad_()
    before = W.detach().clone()
    f = decompose(W.T, 2)
    assert torch.equal(W, before)
    assert not f.U.requires_grad
    assert f.U.is_contiguous()
    assert f.Vh.is_contiguous()


def test_a_matrix_of_zeros_has_zero_factors_and_no_excess() -> None:
    f = decompose(torch.zeros(3, 5), 2)
    assert f.S.tolist() == [0.0, 0.0]
    assert f.excess == 0.0
    A, B = f.lora(1.0)
    assert not A.any()
    assert not B.any()


@pytest.mark.parametrize(
    ("weight", "rank", "options", "message"),
    [
        (torch.zeros(3), 1, {}, r"2 dimensions \(out, in\), got shape \(3,\)"),
        (torch.zeros(2, 3, 4), 1, {}, r"got shape \(2, 3, 4\)"),
        (torch.zeros(3, 4, dtype=torch.int8), 1, {}, "floating point, got torch.int8"),
        (torch.zeros(0, 4), 1, {}, r"empty, shape \(0, 4\)"),
        (torch.zeros(3, 4), 0, {}, r"1\.\.3 for shape \(3, 4\), got 0"),
        (torch.zeros(3, 4), 4, {}, r"1\.\.3 for shape \(3, 4\), got 4"),
        (torch.zeros(3, 4), 1.0, {}, "got 1.0"),
        (torch.zeros(3, 4), True, {}, "got True"),
        (torch.tensor([[1.0, math.nan], [math.inf, 0.0]]), 1, {}, "2 NaN or infinite values, of 4"),
        (torch.zeros(3, 4), 1, {"part": "last"}, "one of minor, principal, random, got 'last'"),
        (torch.zeros(3, 4), 1, {"method": "quick"}, "one of auto, exact, fast, got 'quick'"),
        (torch.zeros(3, 4), 1, {"tol": 0.0}, "tol must be positive, got 0.0"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(weight, rank, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(weight, rank, **options)


@pytest.mark.parametrize("scaling", [0.0, -1.0, math.inf, math.nan])
def test_a_scaling_that_is_no_positive_number_is_refused(scaling: float) -> None:
    with pytest.raises(ValueError, match="scaling must be a positive number"):
        decompose(torch.eye(2), 1).lora(scaling)
