"""The start of a run on several accelerators: where its parts run, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from milora_vl.train.command import main
from support.launched import KINDS, needs_deepspeed
from support.simulated_cluster import CACHE_BYTES, trained_on_cluster
from support.simulated_device import simulated_device
from support.train_runs import losses, training

pytestmark = needs_deepspeed
WORDS = ("--rank", "4", "--dropout", "0", "--max_steps", "2")


def started(kinds: list[str], model: Path, data: Path, folder: Path, **settings: Any) -> None:
    """Train in one process and on the cluster by each kind of launcher; the start is the same, and shared."""
    words = [*WORDS, "--model", str(model), "--factor_cache"]
    with simulated_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("milora_vl.core.calibration.texts.CACHE_BYTES", CACHE_BYTES)
        line = training(data, folder / "one", *words, str(folder / "cache-one"))
        assert main([word for word in line if word != "--use_cpu"]) == 0
    more = ["--per_device_train_batch_size", "2"]
    lines = [training(data, folder / k, *words, str(folder / f"cache-{k}"), *more, *KINDS[k]) for k in kinds]
    expected = load_file(folder / "one" / "adapter_model.safetensors")
    for kind, ranks in zip(kinds, trained_on_cluster(lines, folder, **settings), strict=True):
        for seen in ranks:
            assert not [name for name in seen if name.endswith("on cpu")], (kind, seen)
            assert not seen["left on the CPU"], kind
            assert seen["largest object"] < 100_000, kind
        sums, weights = ([seen[f"{what} on sim"] for seen in ranks] for what in ("sum", "weight"))
        assert (sum(sums), sum(weights)) == (10, 16), kind  # each input of two blocks and the projector, each weight
        assert max(sums) - min(sums) <= 2, kind
        texts = [seen.get("texts", 0) for seen in ranks]
        assert 0 < min(texts) <= max(texts) < 10, kind
        assert settings or sum(texts) == 10, kind  # each text and each caption once
        found = load_file(folder / kind / "adapter_model.safetensors")
        assert all(A.equal(found[name]) for name, A in expected.items() if "lora_A" in name), kind
        assert dict(losses(folder / kind)) == pytest.approx(dict(losses(folder / "one")), abs=1e-4), kind
    assert any("lora_A" in name for name in expected)


def test_zero3_shares_the_start_on_the_accelerators(tiny_data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    started(["zero3"], tiny_folder, tiny_data, tmp_path)


@pytest.mark.slow
def test_a_model_that_fits_no_device_is_gathered_in_each_forward(
    tiny_data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    started(["zero3", "zero3_offload"], tiny_folder, tiny_data, tmp_path, memory=0)


@pytest.mark.slow
def test_every_launcher_shares_the_start_on_the_accelerators(
    tiny_data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    started(list(KINDS), tiny_folder, tiny_data, tmp_path)
