"""Command lines of short trainings on the tiny model, and what their run folders hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METHODS = {method: ["--method", method, "--rank", "4"] for method in ("milora", "lora")}
METHODS |= {"full": ["--method", "full"], "projector": ["--train", "projector", "--method", "full"]}
WEIGHTS = {"full": "model.safetensors", "projector": "mm_projector.safetensors"}


def training(data: Path, run: Path, *more: str) -> list[str]:
    """A command line of six steps."""
    return [
        "--model", "tiny", "--data_path", str(data / "train.json"), "--image_folder", str(data / "images"),
        "--output_dir", str(run), "--max_steps", "6", "--per_device_train_batch_size", "4", "--logging_steps", "1",
        "--save_steps", "2", "--learning_rate", "1e-3", "--disable_tqdm", "--use_cpu", *more,
    ]  # fmt: skip


def losses(run: Path) -> list[tuple[int, float]]:
    """Steps and losses of a run; there are some, or a comparison of them would say nothing."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    found = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    assert found
    return found


def read_json(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def lengthen_data(data: Path, count: int) -> None:
    """Make train.json longer: records of different lengths, some without a picture."""
    records = json.loads((data / "train.json").read_text())
    for number in range(count):
        turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "word " * (number % 7)}]
        records.append({"id": f"m{number}", "conversations": turns})
    (data / "train.json").write_text(json.dumps(records))


def file_contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}
