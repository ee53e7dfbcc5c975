"""Weights with exact zeros, constants and repeated rows: dead units, padding, pruning. Both singular equations hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from milora_vl.core.svd import decompose, frobenius, singular_values

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
    "very many dead inputs": lambda: noise(700, 3000, alive_columns=200),
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


def test_minor_directions_of_a_weight_with_dead_inputs_are_not_its_strong_ones() -> None:
    W = noise(64, 128, alive_columns=40)
    f = decompose(W, 8)
    strong = torch.linalg.svd(W).Vh[:32]
    assert torch.linalg.matrix_norm(f.Vh @ strong.T) < 1e-3


def test_the_default_dtype_and_device_have_no_say() -> None:
    W = noise(700, 700)
    plain = decompose(W, 8)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            f = decompose(W, 8)
            decompose(W, 8, method="exact")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(f.U, plain.U)


def test_the_norm_keeps_its_digits() -> None:
    W = noise(800, 700)
    W[5] *= 1e3
    for view in (W, W.T, W[::2]):
        assert frobenius(view) == pytest.approx(float(view.double().norm()), rel=1e-6)


def test_what_cannot_be_decomposed_is_refused() -> None:
    with pytest.raises(ValueError, match="exceed the range of torch.float32"):
        decompose(torch.full((100, 90), 3e38), 2, "principal")
    with pytest.raises(ValueError, match="NaN"):
        singular_values(torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match="dense torch tensor"):
        decompose(torch.eye(4).to_sparse(), 2)


def test_where_lapack_gives_up_in_float32_float64_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on one CPU with a matrix of clustered values, and not on another: so it is made to happen here."""
    lapack, W = torch.linalg.svd, torch.randn(30, 20, generator=torch.Generator().manual_seed(0))

    def gives_up(matrix: torch.Tensor, **options: bool) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return lapack(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    found = decompose(W, 4, method="exact")
    assert (found.method, found.S.dtype) == ("exact", torch.float32)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(W)[-4:])
