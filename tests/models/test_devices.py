"""The names of devices and dtypes, and what `fastest` becomes in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from milora_vl.models.devices import device_named, dtype_named, fastest_dtype
from milora_vl.train.flags import parse
from milora_vl.train.setup import make_run, with_dtype
from support.machine import fastest
from support.plans import plan, settings

CPU = torch.device("cpu")


def test_names_mean_devices_and_dtypes() -> None:
    assert device_named("cpu") == CPU
    assert device_named(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert dtype_named(None, CPU) is None
    assert dtype_named("bfloat16", CPU) == torch.bfloat16
    assert dtype_named("fastest", CPU) == fastest_dtype(CPU)
    assert fastest_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("answer", ["bfloat16", "float32"])
def test_the_fastest_dtype_of_a_recipe_is_settled_for_this_machine(answer: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{model: tiny, dtype: fastest, train: {use_cpu: true}}")
    with fastest(answer):
        found = plan(["--recipe", str(recipe), "--rank", "4", "--output_dir", str(tmp_path / "run")])
        assert fastest_dtype(CPU) == getattr(torch, answer)
    assert found.recipe.dtype == answer
    assert found.derived.train.get("bf16", False) == (answer == "bfloat16")


def test_bf16_on_a_cpu_that_emulates_it_is_warned_of(tmp_path: Path) -> None:
    words = f"--model tiny --rank 4 --bf16 True --device cpu --output_dir {tmp_path / 'run'}"
    for answer, warns in (("float32", True), ("bfloat16", False)):
        with fastest(answer):
            found = make_run(settings(words), is_started=True)
        assert any("bf16 is emulated" in warning for warning in found.warnings) == warns


def test_a_resumed_run_keeps_its_dtype_whatever_is_the_fastest_here(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("{model: tiny, dtype: float16}")
    words = ["--model", "tiny", "--dtype", "fastest", "--device", "cpu", "--output_dir", str(run)]
    again = ["--resume_from_checkpoint", "auto"]
    recipe = settings(words).recipe
    assert with_dtype(recipe, parse([*words, *again])).dtype != "float16"  # it begins again
    (run / "checkpoint-3").mkdir()
    assert with_dtype(recipe, parse([*words, *again])).dtype == "float16"
    assert with_dtype(recipe, parse(words)).dtype in ("bfloat16", "float32")
