from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from milora_vl.core.svd import decompose
from milora_vl.core.weights.tensor_files import cache_key, read_factors, write_factors

W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    model[0].weight.data = W.clone()
    model[1].weight.data = W[:4].T.clone().T @ torch.eye(5, 6)
    return model


def test_factors_come_back_as_they_were(tmp_path: Path) -> None:
    made = decompose(W, 2)
    write_factors(tmp_path / "new", "k", made)
    back = read_factors(tmp_path / "new", "k")
    assert back is not None
    for name in ("U", "S", "Vh", "index"):
        assert torch.equal(getattr(back, name), getattr(made, name))
    assert (back.norm, back.sigma_max, back.excess, back.method) == (
        made.norm,
        made.sigma_max,
        made.excess,
        made.method,
    )
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["k.safetensors"]


def test_damaged_and_missing_entries_are_none(tmp_path: Path) -> None:
    assert read_factors(tmp_path, "k") is None
    write_factors(tmp_path, "k", decompose(W, 2))
    file = tmp_path / "k.safetensors"
    for damage in (file.read_bytes()[:-9], b"", b"junk"):
        file.write_bytes(damage)
        assert read_factors(tmp_path, "k") is None


def test_the_key_depends_on_everything_that_changes_the_factors() -> None:
    keys = [
        cache_key(W, 2, "minor", 0),
        cache_key(W, 3, "minor", 0),
        cache_key(W, 2, "principal", 0),
        cache_key(W, 2, "random", 1),
        cache_key(W.T, 2, "minor", 0),
        cache_key(W.bfloat16(), 2, "minor", 0),
        cache_key(W + 1, 2, "minor", 0),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(W.clone(), 2, "minor", 0) == keys[0]
