"""Ranks from singular values: policies with numbers, which `with_ranks` finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from milora_vl.analyze.__main__ import main
from milora_vl.core.policy import Policy, PolicyError, Target
from milora_vl.core.policy.policy import SpectralRank, with_ranks
from milora_vl.core.weights import tensor_files
from milora_vl.core.weights.matrices import read_matrix
from milora_vl.core.weights.tensor_files import cached_singular_values
from milora_vl.models.loading import load_weights
from support.problems import raises_code

FIVE = {"modules": "language", "method": "milora", "protect": 0, "rank": 5, "alpha": 10}


class Spectra(nn.Module):
    """Layers whose singular values are 1 to 10, 10 times 1 to 10, and, with `has_flat`, all equal."""

    def __init__(self, *, has_flat: bool = True) -> None:
        super().__init__()
        U, _ = torch.linalg.qr(torch.randn(12, 10, generator=torch.Generator().manual_seed(0)))
        names = ("a", "b", "flat") if has_flat else ("a", "b")
        values = {"a": torch.arange(1.0, 11.0), "b": 10 * torch.arange(1.0, 11.0), "flat": torch.ones(10)}
        for name in names:
            layer = nn.Linear(10, 12, bias=False)
            layer.weight.data = (U * values[name]).contiguous()
            self.add_module(name, layer)


def resolved(rule: dict[str, Any], cache: Path | None = None, **rank: Any) -> list[Target]:
    model = Spectra()

    def spectrum(path: str) -> Tensor:
        return cached_singular_values(read_matrix(model.get_submodule(path)), cache)

    return with_ranks(Policy.parse([rule]), model, SpectralRank(**rank), spectrum).resolve(model)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ({"threshold": 0.35}, 3),  # 1, 2, 3 are at most 3.5
        ({"threshold": 0.35, "max": 2}, 2),
        ({"threshold": 0.05, "min": 2}, 2),
        ({"energy": 0.04}, 3),  # (1 + 4 + 9) / 385 = 0.036
        ({"energy": 0.036}, 2),
        ({"energy": 1.0}, 10),
        ({"threshold": 1.0, "max": 99}, 10),
    ],
)
def test_ranks_are_found_from_the_spectrum_and_the_scale_stays(rank: dict[str, Any], expected: int) -> None:
    for target in resolved(FIVE, **rank)[:2]:
        assert (target.rank, target.alpha) == (expected, 2 * expected)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ({"budget": 6 * 22, "min": 1}, [3, 2, 1]),
        ({"budget": 10**6}, [10, 10, 10]),
        ({"budget": 10**6, "max": 4}, [4, 4, 4]),
        ({"budget": 8 * 22, "max": 3, "min": 2}, [3, 3, 2]),
    ],
)
def test_a_budget_goes_to_the_smallest_shares_first(rank: dict[str, int], expected: list[int]) -> None:
    targets = resolved(FIVE, **rank)
    assert [target.rank for target in targets] == expected
    assert {target.scaling for target in targets} == {2}


def test_a_budget_counts_what_trains_where_a_is_fixed() -> None:
    targets = resolved({**FIVE, "protect": 0.5}, budget=6 * 22)
    assert 5 * 22 < sum((target.rank or 0) * target.shape[0] for target in targets) <= 6 * 22


def test_a_budget_below_the_smallest_ranks_is_refused() -> None:
    with raises_code("policy-rank", where="budget", says="65 parameters are too few.*needs 66", kind=PolicyError):
        resolved(FIVE, budget=65)


def test_modules_that_train_in_full_have_no_rank_and_a_policy_needs_an_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rules = [{"modules": "0", "method": "full"}, {"modules": "1", "method": "lora"}]
    found = with_ranks(Policy.parse(rules), model, SpectralRank(energy=1), lambda path: torch.ones(4))
    assert found.to_list()[2:] == [{"modules": "1", "rank": 4}]
    with raises_code("policy-no-adapter-rule", where="policy", kind=PolicyError):
        with_ranks(Policy.parse(rules[:1]), model, SpectralRank(energy=1), lambda path: torch.ones(4))


@pytest.mark.parametrize("rank", [{"energy": 0.2}, {"threshold": 0.4}, {"budget": 400}])
def test_a_second_look_finds_the_spectra_in_the_cache(
    rank: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = resolved(FIVE, **rank)
    assert resolved(FIVE, tmp_path, **rank) == plain
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(tensor_files, "singular_values", None)
    assert resolved(FIVE, tmp_path, **rank) == plain


@pytest.mark.parametrize(
    ("fields", "where", "message"),
    [
        ({}, "", "exactly one of energy, threshold and budget"),
        ({"energy": 0.1, "threshold": 0.1}, "", "exactly one"),
        ({"energy": 1.5}, "energy", "expected a share above 0, at most 1, got 1.5"),
        ({"budget": 0.5}, "budget", "expected a number of parameters, got 0.5"),
        ({"energy": 0.1, "min": 4, "max": 2}, "", "min <= max, got min 4, max 2"),
    ],
)
def test_what_is_no_measure_is_refused(fields: dict[str, Any], where: str, message: str) -> None:
    with raises_code("policy-value", where=where, message=message, kind=PolicyError):
        SpectralRank(**fields)


def test_the_command_writes_a_policy_that_fits_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["ranks", "tiny", "--energy", "0.01", "--factor_cache", str(tmp_path)]) == 0
    rules = yaml.safe_load(capsys.readouterr().out)
    model = load_weights("tiny")
    adapters = [target for target in Policy.parse(rules).resolve(model) if target.rank is not None]
    assert len(adapters) == len(rules) - 2 == len(list(tmp_path.iterdir())) == 16
    for target in adapters:
        sigma = torch.linalg.svdvals(read_matrix(model.get_submodule(target.path)).double())
        minor = sigma.flip(0).square().cumsum(0) / sigma.square().sum()
        assert target.rank == max(1, int((minor <= 0.01).sum()))
