"""What the search is made of, each against torch's own."""

from __future__ import annotations

import pytest
import torch

from milora_vl.core.svd.gram import Cholesky, add_to_lower, flatten, lower_gram, mean_eigenvalue, mirror
from milora_vl.core.svd.search import Lanczos

generator = torch.Generator()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Each test draws the same ones, whichever ran before it."""
    generator.manual_seed(0)


@pytest.mark.parametrize("n", [5, 256, 257, 700])
def test_factor_and_solution_are_those_of_the_whole_matrix(n: int) -> None:
    W = torch.randn(n + 40, n, generator=generator, dtype=torch.float64)
    V = torch.linalg.qr(torch.randn(n, 3, generator=generator, dtype=torch.float64)).Q
    G = lower_gram([W[:9], W[9:]], n)
    factor = Cholesky.of(G, torch.empty_like(G), -0.5, V, 7.0)
    assert factor is not None
    X = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    whole = W.T @ W + 7.0 * V @ V.T + 0.5 * torch.eye(n, dtype=torch.float64)
    assert torch.allclose(whole @ factor.solve(X), X, atol=1e-9)
    eigenvalues = torch.linalg.eigvalsh(W.T @ W)
    assert mean_eigenvalue(G) == pytest.approx(float(eigenvalues.square().sum() / eigenvalues.sum()))


@pytest.mark.parametrize("n", [5, 256, 257, 700])
def test_a_sum_of_lower_halves_is_the_whole_sum_after_mirroring(n: int) -> None:
    parts = torch.randn(2, 9, n, generator=generator, dtype=torch.float64)
    G = torch.zeros(n, n, dtype=torch.float64)
    for part in parts:
        add_to_lower(G, part)
    assert mirror(G) is G
    torch.testing.assert_close(G, sum(part.T @ part for part in parts))


def test_a_shift_above_the_first_eigenvalue_is_not_positive_definite() -> None:
    W = torch.randn(300, 280, generator=generator, dtype=torch.float64)
    G = lower_gram([W], 280)
    first = float(torch.linalg.svdvals(W)[-1]) ** 2
    assert Cholesky.of(G, torch.empty_like(G), 1.01 * first) is None
    assert Cholesky.of(G, torch.empty_like(G), 0.99 * first) is not None


def test_lanczos_finds_the_upper_end() -> None:
    H = torch.diag(1.1 ** torch.arange(200, dtype=torch.float64))
    lanczos = Lanczos(lambda X: H @ X, torch.randn(200, 8, generator=generator, dtype=torch.float64))
    for _ in range(14):
        lanczos.step()
    values, vectors = lanczos.ritz(4)
    assert torch.allclose(values, H.diagonal().flip(0)[:4], rtol=1e-9)
    assert vectors.abs().argmax(dim=0).tolist() == [199, 198, 197, 196]


@pytest.mark.parametrize("layout", ["upright", "turned"])
def test_flattening_clips_what_stands_out_and_is_the_product_it_says(layout: str) -> None:
    strong = torch.randn(2300, 5, generator=generator) @ torch.randn(5, 400, generator=generator)
    W = torch.randn(2300, 400, generator=generator) + 10 * strong
    W = W if layout == "upright" else W.T.contiguous().T
    flat = flatten(W, True, torch.Generator().manual_seed(0))
    clipped = torch.cat([chunk.clone() for chunk in flat.rows(torch.float32)])
    assert torch.allclose(clipped, flat.scale(W.T).T, atol=2e-2)
    top = torch.linalg.matrix_norm(W, 2)
    assert torch.linalg.matrix_norm(clipped, 2) < 0.1 * top
    assert flat.sigma_max == pytest.approx(float(top), rel=1e-3)
    assert flatten(W - 10 * strong, True, torch.Generator().manual_seed(0)).damping.numel() == 0
