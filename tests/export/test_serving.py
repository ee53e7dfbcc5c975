"""transformers' own server with a merged model gives the answers and scores of a local run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from milora_eval.__main__ import main as evaluate
from milora_vl import load_model
from milora_vl.export import export
from milora_vl.models.tiny import tiny_llava
from milora_vl.train.__main__ import main as train
from support import official_data
from support.drawn import write_tiny_data
from support.eval_questions import write_questions
from support.served import serving
from support.vlm_runs import write_model

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")
pytest.importorskip("uvicorn", reason="pip install 'transformers[serving]'")


@pytest.fixture(scope="module")
def run(tiny_records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a trained `run` on `base`, and the `merged` model."""
    folder = tmp_path_factory.mktemp("trained")
    for part in tiny_llava(seed=2):  # one whose answers differ from question to question
        part.save_pretrained(folder / "base")
    tiny_data = write_tiny_data(folder / "data", tiny_records)
    data = ["--data_path", str(tiny_data / "train.json"), "--image_folder", str(tiny_data / "images")]
    sizes = ["--rank", "4", "--max_steps", "8", "--learning_rate", "0.001"]
    train(["--model", str(folder / "base"), *data, *sizes, "--output_dir", str(folder / "run")])
    export(folder / "run", "merged", folder / "merged")
    return folder


def command(model: Path) -> list[str | Path]:
    return [Path(sys.executable).with_name("transformers"), "serve", model, "--device", "cpu"]


def redraw(folder: Path) -> None:
    """Draw the weights of a model again, wider, so that its answers differ from question to question."""
    model, _ = load_model(str(folder))
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_an_evaluation_through_the_server_equals_the_local_one(kind: str, run: Path, tmp_path: Path) -> None:
    """With pictures in the form of training and of LLaVA's evaluation, and a text without a template."""
    model, data = run / "merged", tmp_path / "data"
    if kind != "llava":
        model = write_model(kind, tmp_path / "model")
        redraw(model)
    write_questions(data / "emoji")
    official_data.write(data, "pope")
    official_data.mathematics(data)
    asked = ["--benchmarks", "emoji,pope,gsm8k", "--data", str(data), "--output_dir", str(tmp_path)]
    assert evaluate(["run", "--model", str(model), *asked, "--forgetting_tokens", "0"]) == 0
    with serving(command(model)) as address:
        served = ["--server", address.removesuffix("/chat/completions"), "--served_model", str(model)]
        assert evaluate(["run", *served, *asked]) == 0
    [there, here] = sorted(
        (tmp_path / "eval" / "emoji+pope+gsm8k").iterdir(), key=lambda path: "served" not in path.name
    )
    lines = [[json.loads(line) for line in (folder / "predictions.jsonl").open()] for folder in (here, there)]
    assert len({line["prediction"] for line in lines[0]}) > 3
    for name in ("benchmark", "id", "prediction", "truncated", "correct"):
        assert [line.get(name) for line in lines[0]] == [line.get(name) for line in lines[1]], name
    results = [json.loads((folder / "results.json").read_text()) for folder in (here, there)]
    assert results[0]["benchmarks"] == results[1]["benchmarks"]
