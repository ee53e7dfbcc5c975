from __future__ import annotations

from pathlib import Path

import torch

from milora_vl.core.svd import decompose
from milora_vl.core.weights.tensor_files import cache_key, cached_factors

W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def test_factors_come_back_as_they_were_and_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    made = decompose(W, 2)
    for damage in (None, lambda whole: whole[:-9], lambda whole: b"", lambda whole: b"junk"):
        if damage:
            (file,) = tmp_path.iterdir()
            file.write_bytes(damage(file.read_bytes()))
        for _ in range(2):
            back = cached_factors(W, 2, "minor", tmp_path)
            for name in ("U", "S", "Vh", "index"):
                assert torch.equal(getattr(back, name), getattr(made, name))
            assert [back.norm, back.sigma_max, back.excess] == [made.norm, made.sigma_max, made.excess]
            assert back.method == made.method
    assert len(list(tmp_path.iterdir())) == 1


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
