"""A machine where bfloat16 is the fastest data type: a run, its evaluation, chat and forgetting, as in the demo."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from milora_eval.__main__ import main as evaluate
from milora_vl.train import main as train
from support.drawn import write_tiny_data
from support.eval_questions import write_questions
from support.machine import fastest
from support.train_runs import losses, read_json, training

pytestmark = pytest.mark.usefixtures("bfloat16_is_fastest")
LARGE_STEPS = ("--rank", "4", "--learning_rate", "1e-2", "--max_steps", "2")  # beside them, rounding is small


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_records: list[dict[str, Any]]) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"), tiny_records)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16") / "run"
    with fastest("bfloat16"):
        assert train(training(data, folder, *LARGE_STEPS, "--dtype", "fastest")) == 0
    return folder


def test_a_run_trains_float32_factors_of_a_base_in_bfloat16(run: Path) -> None:
    assert read_json(run, "environment.json")["dtype"] == "bfloat16"
    assert all(isfinite(loss) for _, loss in losses(run))
    weights = load_file(run / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_an_evaluation_in_it_measures_nearly_what_float32_does(run: Path, tmp_path: Path) -> None:
    suite = ("--suite", "emoji", "--data", str(write_questions(tmp_path / "emoji")), "--limit", "4")
    kl, answers = {}, {}
    for dtype in ("float32", "fastest"):
        target = ("--model", "tiny", "--adapter", str(run), "--output_dir", str(tmp_path / dtype))
        how = ("--forgetting_tokens", "300", "--dtype", dtype, "--device", "cpu")
        assert evaluate(["run", *target, *suite, *how]) == 0
        folder = tmp_path / dtype / "eval" / "emoji" / "final"
        kl[dtype] = read_json(folder, "results.json")["forgetting"]["kl"]
        (stored,) = folder.rglob("predictions.jsonl")
        answers[dtype] = [json.loads(line)["prediction"] for line in stored.read_text(encoding="utf-8").splitlines()]
    assert kl["fastest"] != kl["float32"]
    assert kl["fastest"] == pytest.approx(kl["float32"], rel=0.1)
    assert sum(map(str.__eq__, *answers.values())) >= 3
