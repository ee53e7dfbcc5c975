"""`analyze ranks`: policies whose ranks follow from singular values."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from milora_vl.analyze.__main__ import main
from milora_vl.analyze.ranks import ranks_of
from milora_vl.core.policy import Policy, Target
from milora_vl.core.weights import tensor_files
from milora_vl.core.weights.matrices import read_matrix
from milora_vl.models.loading import load_weights
from support.problems import raises_code

# 1 to 10, 10 times that, and all equal
SPECTRA = {"a": torch.arange(1.0, 11.0), "b": 10 * torch.arange(1.0, 11.0), "flat": torch.ones(10)}
NONE = {"energy": None, "threshold": None, "budget": None, "min": 1, "max": None}


def ranks(protect: float = 0, **options: Any) -> list[int]:
    def target(path: str) -> Target:
        fields = {"path": path, "shape": (12, 10), "tower": "language", "method": "milora", "rank": 1, "alpha": 2.0}
        return Target(**fields, protect=protect)

    return list(ranks_of([target(path) for path in SPECTRA], SPECTRA, Namespace(**NONE | options)).values())


@pytest.mark.parametrize(
    ("options", "expected"),
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
def test_ranks_are_found_from_the_spectrum(options: dict[str, Any], expected: int) -> None:
    assert ranks(**options)[:2] == [expected, expected]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budget": 6 * 22}, [3, 2, 1]),
        ({"budget": 6 * 12, "protect": 0.5}, [3, 2, 1]),  # A is fixed, and B alone counts
        ({"budget": 10**6}, [10, 10, 10]),
        ({"budget": 10**6, "max": 4}, [4, 4, 4]),
        ({"budget": 8 * 22, "max": 3, "min": 2}, [3, 3, 2]),
    ],
)
def test_a_budget_goes_to_the_smallest_shares_first(options: dict[str, Any], expected: list[int]) -> None:
    assert ranks(**options) == expected


def test_a_budget_below_the_smallest_ranks_is_refused() -> None:
    with raises_code("policy-rank", where="--budget", says="65 parameters are too few.*needs 66"):
        ranks(budget=65)


@pytest.mark.parametrize(
    ("words", "code", "where"),
    [
        ((), "command-line", ""),
        (("--energy", "0.1", "--threshold", "0.1"), "command-line", ""),
        (("--energy", "1.5"), "command-line", ""),
        (("--energy", "0.1", "--min", "4", "--max", "2"), "", "--min --max"),
        (("--energy", "0.1", "--policy", "[{modules: projector, method: full}]"), "policy-no-adapter-rule", "--policy"),
    ],
)
def test_what_gives_no_ranks_is_refused(words: tuple[str, ...], code: str, where: str) -> None:
    with raises_code(code, where=where):
        main(["ranks", "tiny", *words])


def test_the_policy_fits_the_model_and_a_second_run_finds_the_spectra_in_the_cache(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = ["--policy", "[{modules: language, method: milora, protect: 0, rank: 5, alpha: 10}]"]
    words = ["ranks", "tiny", *policy, "--energy", "0.01", "--factor_cache", str(tmp_path)]
    assert main(words) == 0
    text = capsys.readouterr().out
    rules = yaml.safe_load(text)
    model = load_weights("tiny")
    adapters = [target for target in Policy.parse(rules).resolve(model) if target.rank is not None]
    assert len(adapters) == len(rules) - 1 == len(list(tmp_path.iterdir())) == 14
    for target in adapters:
        sigma = torch.linalg.svdvals(read_matrix(model.get_submodule(target.path)).double())
        minor = sigma.flip(0).square().cumsum(0) / sigma.square().sum()
        assert target.rank == max(1, int((minor <= 0.01).sum()))
        assert target.scaling == 2, "the scale alpha / rank stays"
    monkeypatch.setattr(tensor_files, "singular_values", None)
    assert main(words) == 0
    assert capsys.readouterr().out == text
