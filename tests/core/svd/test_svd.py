"""`decompose` on small and degenerate matrices, against torch; the parts of the search, each against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milora_vl.core.svd import Factors, decompose

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


generator = torch.Generator()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Each test draws the same ones, whichever ran before it."""
    generator.manual_seed(0)


def noise(rows: int, columns: int, alive_rows: int | None = None, alive_columns: int | None = None) -> Tensor:
    W = torch.randn(rows, columns, generator=generator)
    if alive_rows is not None:
        W[alive_rows:] = 0
    if alive_columns is not None:
        W[:, alive_columns:] = 0
    return W


CASES: dict[str, Callable[[], Tensor]] = {
    "dead inputs, small": lambda: noise(64, 128, alive_columns=40),
    "one live input": lambda: noise(5, 8, alive_columns=1),
    "dead inputs": lambda: noise(700, 1000, alive_columns=600),
    "just too few live inputs": lambda: noise(700, 1000, alive_columns=695),
    "very many dead inputs": lambda: noise(650, 1950, alive_columns=130),
    "dead outputs": lambda: noise(900, 700, alive_rows=500),
    "dead outputs, wide": lambda: noise(900, 700, alive_rows=500).T,
    "one live output": lambda: noise(900, 700, alive_rows=1),
    "constant": lambda: torch.ones(700, 900),
    "sparse": lambda: noise(480, 560) * (torch.rand(480, 560, generator=generator) < 0.01),
    "diagonal": lambda: torch.diag(torch.tensor([3.0, 0.0, 0.0])),
    "repeated rows": lambda: noise(70, 900).repeat_interleave(10, dim=0),
    "zero": lambda: torch.zeros(700, 800),
    "zero, small": lambda: torch.zeros(30, 20),
    "constant and a little noise": lambda: 0.1 + 1e-3 * noise(700, 800),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("part", ["minor", "principal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_singular_equations_hold(name: str, part: str, dtype: torch.dtype) -> None:
    W = CASES[name]().to(dtype)
    rank = min(8, *W.shape)
    f = decompose(W, rank, part)
    norm = max(float(torch.linalg.matrix_norm(W)), 1e-30)
    S = torch.linalg.svdvals(W.double())
    true = S[-rank:] if part == "minor" else S[:rank]
    eye = torch.eye(rank, dtype=dtype)
    assert (f.U.T @ f.U - eye).abs().max() < 1e-5
    assert (f.Vh @ f.Vh.T - eye).abs().max() < 1e-5
    assert torch.linalg.matrix_norm(W @ f.Vh.T - f.U * f.S) < 5e-6 * norm
    assert torch.linalg.matrix_norm(W.T @ f.U - f.Vh.T * f.S) < 5e-3 * norm
    stated, held = float(f.S.double().norm()), float(true.norm())
    assert abs(stated - held) <= f.excess * held + 1e-6 * norm


def test_what_cannot_be_decomposed_is_refused() -> None:
    with pytest.raises(ValueError, match="exceed the range of torch.float32"):
        decompose(torch.full((100, 90), 3e38), 2, "principal")
    with pytest.raises(ValueError, match="dense torch tensor"):
        decompose(torch.eye(4).to_sparse(), 2)


def test_where_lapack_gives_up_in_float32_float64_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One CPU did this with a matrix of clustered values, another did not. The test forces it."""
    lapack, W = torch.linalg.svd, torch.randn(30, 20, generator=torch.Generator().manual_seed(0))

    def gives_up(matrix: torch.Tensor, **options: bool) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return lapack(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    found = decompose(W, 4, method="exact")
    assert (found.method, found.S.dtype) == ("exact", torch.float32)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(W)[-4:])


KINDS = (
    "gaussian", "low-rank", "power", "steep power", "exponential", "very steep", "rank-deficient", "one component",
    "flat", "clustered", "multiple", "outliers", "cliff", "uniform",
)  # fmt: skip

FLOOR = 5e-7  # of ||W||_F


def drawn(rows: int, columns: int, kind: str, seed: int = 0) -> Tensor:
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


@settings(max_examples=80, deadline=None)
@given(
    st.integers(24, 90), st.sampled_from([1.0, 1.3, 3.0]), st.booleans(), st.sampled_from(KINDS), st.integers(1, 30),
    st.sampled_from(["minor", "principal"]), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape_rank_dtype_and_spectrum_keeps_every_promise(n, tall, turned, kind, rank, part, dtype, seed) -> None:
    W = drawn(int(tall * n), n, kind, seed).to(dtype)
    W = W.T if turned else W
    check(W, decompose(W, min(rank, n), part, method="fast"), part)


def test_it_repeats_to_the_last_bit_and_leaves_everything_else_alone() -> None:
    W = drawn(700, 700, "low-rank").float()
    before, state = W.clone(), torch.get_rng_state()
    f, g = decompose(W, 8), decompose(W, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(W, before)
    for one, other in ((f.U, g.U), (f.S, g.S), (f.Vh, g.Vh)):
        assert torch.equal(one, other)
        assert one.is_contiguous()


def test_low_precision_products_asked_for_elsewhere_do_not_spoil_it() -> None:
    W = drawn(700, 700, "gaussian").float()
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
    steep = drawn(700, 700, "exponential").float()
    assert decompose(drawn(700, 700, "gaussian").float(), 16).method == "gram"
    assert decompose(steep, 16).method == "gram64"
    assert decompose(steep, 16, tol=1e-12).method in ("gram64", "eigh")
    assert decompose(steep.double(), 16).method == "gram64"
    assert decompose(drawn(700, 700, "very steep"), 16).method == "exact"
    assert decompose(steep, 16, method="exact").method == "exact"
    assert decompose(steep[:300], 16).method == "eigh"
    assert decompose(steep, 16, "random").method == "eigh"


def test_sigma_max_and_norm_are_those_of_the_weight() -> None:
    for kind in ("low-rank", "power", "gaussian"):
        W = drawn(900, 700, kind).float()
        f = decompose(W, 8)
        top = float(torch.linalg.matrix_norm(W, 2))
        assert 0.6 * top < f.sigma_max < 1.01 * top
        assert f.norm == pytest.approx(float(torch.linalg.matrix_norm(W)), rel=1e-5)
