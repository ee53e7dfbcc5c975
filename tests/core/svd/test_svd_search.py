"""The search for a few triplets: right, certified, repeatable, on every kind of spectrum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milora_vl.core.svd import Factors, decompose, singular_values

KINDS = (
    "gaussian", "low-rank", "power", "steep power", "exponential", "very steep", "rank-deficient", "one component",
    "flat", "clustered", "multiple", "outliers", "cliff", "uniform",
)  # fmt: skip
FLOOR = 5e-7  # of ||W||_F


def matrix(rows: int, columns: int, kind: str, seed: int = 0) -> Tensor:
    """A float64 matrix with the spectrum that `kind` names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = min(rows, columns)
    if kind == "gaussian":
        return draw(rows, columns)
    if kind == "low-rank":
        few = min(64, n // 3)
        return draw(rows, columns) + 30 * few**-0.5 * draw(rows, few) @ draw(few, columns)
    i = torch.arange(n, dtype=torch.float64)
    r = torch.rand(n, generator=generator, dtype=torch.float64)
    S = {
        "power": 1 / (i + 1),
        "steep power": (i + 1) ** -2,
        "exponential": 10 ** (-4 * i / n),
        "very steep": 10 ** (-9 * i / n),
        "rank-deficient": torch.where(i < n // 2, 1 + r, 0.0),
        "one component": torch.where(i < 1, 1.0, 0.0),
        "flat": torch.ones_like(i),
        "clustered": torch.where(i < n - n // 5, 2 - i / n, 0.5 + 1e-4 * r),
        "multiple": torch.where(i < n - n // 10, 1 + r, 0.01),
        "outliers": torch.where(i < 3, 1000.0, r),
        "cliff": torch.where(i < n - 12, 1 + r, 0.01 * (1 + r)),
        "uniform": r,
    }[kind].double()
    U, V = torch.linalg.qr(draw(rows, n)).Q, torch.linalg.qr(draw(columns, n)).Q
    return (U * S) @ V.T


def check(W: Tensor, f: Factors, part: str) -> None:
    """Every promise of `decompose`, against a float64 decomposition that is not ours."""
    wide = W.double()
    S = torch.linalg.svdvals(wide)
    rank = f.S.numel()
    U, V = f.U.double(), f.Vh.double().T
    norm = float(torch.linalg.vector_norm(wide))
    eye = torch.eye(rank, dtype=torch.float64)
    assert (U.T @ U - eye).abs().max() < 1e-5
    assert (V.T @ V - eye).abs().max() < 1e-5
    assert torch.linalg.vector_norm(wide @ V - U * f.S) < 5e-5 * norm
    assert (f.S[:-1] >= f.S[1:]).all()
    held = torch.linalg.vector_norm(wide @ V if W.shape[0] >= W.shape[1] else U.T @ wide)
    true = torch.linalg.vector_norm(S[-rank:] if part == "minor" else S[:rank])
    difference = float(held - true if part == "minor" else true - held)
    assert difference <= f.excess * float(true) * 1.01 + FLOOR * norm
    assert difference >= -FLOOR * norm
    assert f.excess <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["minor", "principal"])
def test_matrices_of_every_kind_keep_every_promise(kind: str, part: str) -> None:
    W = matrix(480, 360, kind).float()
    f = decompose(W, 12, part, method="fast")
    # Of one component alone the others that are asked for lie in rounding: nothing can be proven there.
    assert f.method in ("gram", "gram64") or (kind, part) == ("one component", "principal")
    check(W, f, part)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(24, 90), st.sampled_from([1.0, 1.3, 3.0]), st.booleans(), st.sampled_from(KINDS), st.integers(1, 30),
    st.sampled_from(["minor", "principal"]), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape_rank_dtype_and_spectrum_keeps_every_promise(n, tall, turned, kind, rank, part, dtype, seed) -> None:
    W = matrix(int(tall * n), n, kind, seed).to(dtype)
    W = W.T if turned else W
    check(W, decompose(W, min(rank, n), part, method="fast"), part)


def test_of_a_separate_tail_it_finds_the_space_of_the_exact_decomposition() -> None:
    W = matrix(800, 800, "cliff").float()
    f = decompose(W, 12)
    _, S, Vh = torch.linalg.svd(W.double())
    cosines = torch.linalg.svdvals(f.Vh.double() @ Vh[-12:].T)
    assert cosines.min() > 1 - 1e-6
    assert torch.allclose(f.S.double(), S[-12:], rtol=1e-4)


def test_a_transposed_weight_gives_the_transposed_factors() -> None:
    W = matrix(1000, 700, "gaussian").float()
    f, g = decompose(W, 8), decompose(W.T, 8)
    assert torch.allclose(f.S, g.S, rtol=1e-4)
    assert torch.linalg.svdvals(f.Vh @ g.U).min() > 0.999


def test_it_repeats_to_the_last_bit_and_leaves_everything_else_alone() -> None:
    W = matrix(700, 700, "low-rank").float()
    before, state = W.clone(), torch.get_rng_state()
    f, g = decompose(W, 8), decompose(W, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(W, before)
    for one, other in ((f.U, g.U), (f.S, g.S), (f.Vh, g.Vh)):
        assert torch.equal(one, other)
        assert one.is_contiguous()


def test_low_precision_products_asked_for_elsewhere_do_not_spoil_it() -> None:
    W = matrix(700, 700, "gaussian").float()
    plain = decompose(W, 8)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            f = decompose(W, 8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(f.U, plain.U)


def test_it_escalates_where_float32_is_blind_and_says_so() -> None:
    steep = matrix(700, 700, "exponential").float()
    assert decompose(matrix(700, 700, "gaussian").float(), 16).method == "gram"
    assert decompose(steep, 16).method == "gram64"
    assert decompose(steep, 16, tol=1e-12).method in ("gram64", "eigh")
    assert decompose(steep.double(), 16).method == "gram64"
    assert decompose(matrix(700, 700, "very steep"), 16).method == "exact"
    assert decompose(steep, 16, method="exact").method == "exact"
    assert decompose(steep[:300], 16).method == "eigh"
    assert decompose(steep, 16, "random").method == "eigh"


def test_sigma_max_and_norm_are_those_of_the_weight() -> None:
    for kind in ("low-rank", "power", "gaussian"):
        W = matrix(900, 700, kind).float()
        f = decompose(W, 8)
        top = float(torch.linalg.matrix_norm(W, 2))
        assert 0.6 * top < f.sigma_max < 1.01 * top
        assert f.norm == pytest.approx(float(torch.linalg.matrix_norm(W)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_singular_values_are_all_of_them(dtype: torch.dtype) -> None:
    W = matrix(30, 50, "power").to(dtype)
    assert torch.allclose(singular_values(W).double(), torch.linalg.svdvals(W.double()), atol=1e-7)
