from __future__ import annotations

import pytest
import torch

from milora_vl.core.weights.matrices import Fingerprint, distance, fingerprint


def weight(seed: int = 0, rows: int = 48, columns: int = 40) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
def test_roundings_of_one_weight_are_the_same(there: torch.dtype, here: torch.dtype) -> None:
    for seed in range(20):
        assert distance(fingerprint(weight(seed).to(there)), weight(seed).to(here)) < 1


def test_large_weights_in_half_precision_are_the_same() -> None:
    W = weight(1, 1024, 1536)
    assert distance(fingerprint(W.bfloat16()), W) < 1
    assert distance(fingerprint(W), W + 0.2 * weight(2, 1024, 1536)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_are_not(dtype: torch.dtype) -> None:
    for seed in range(20):
        assert distance(fingerprint(weight(seed).to(dtype)), weight(seed + 1).to(dtype)) > 5


def test_in_float32_a_small_change_is_seen() -> None:
    W = weight()
    assert distance(fingerprint(W), W * (1 + 1e-6)) < 1
    assert distance(fingerprint(W), W + 1e-3 * weight(1)) > 1
    assert distance(fingerprint(W), W * 1.001) > 1


def test_rows_and_columns_added_later_do_not_count_and_missing_ones_do() -> None:
    W = weight()
    assert distance(fingerprint(W), torch.cat([torch.cat([W, weight(1)]), weight(2, 96, 8)], dim=1)) < 1
    assert distance(fingerprint(W), W[:-1]) == float("inf")


def test_a_sketch_survives_json() -> None:
    import dataclasses
    import json

    made = fingerprint(weight())
    assert Fingerprint.from_dict(json.loads(json.dumps(dataclasses.asdict(made)))) == made


def test_a_sketch_is_the_same_on_every_machine() -> None:
    """Its signs come from arithmetic, not from a random generator."""
    W = torch.arange(12.0).reshape(3, 4)
    assert [round(value, 4) for value in fingerprint(W).values[:3]] == pytest.approx(RECORDED, abs=1e-4)


def test_zeros_have_a_sketch() -> None:
    assert distance(fingerprint(torch.zeros(3, 4)), torch.zeros(3, 4)) == 0
    assert distance(fingerprint(torch.zeros(3, 4)), torch.ones(3, 4)) > 1


RECORDED = [0.1778, 2.9341, -0.3556]
