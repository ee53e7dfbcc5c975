"""`--forgetting_every N`: the log of a training has what it costs, for every method, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milora_vl.train.__main__ import main


def trained(data: Path, run: Path, *more: str) -> list[dict[str, Any]]:
    """The log of a training of five steps."""
    flags = [
        "--model", "tiny", "--data_path", str(data / "train.json"), "--image_folder", str(data / "images"),
        "--output_dir", str(run), "--max_steps", "5", "--per_device_train_batch_size", "4", "--logging_steps", "1",
        "--learning_rate", "5e-3", "--disable_tqdm", "--use_cpu", *more,
    ]  # fmt: skip
    assert main(flags) == 0
    log: list[dict[str, Any]] = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return log


@pytest.mark.parametrize("method", [["milora", "--rank", "4", "--protect", "0"], ["full"]])
def test_forgetting_grows_in_the_log(method: list[str], tiny_data: Path, tmp_path: Path) -> None:
    log = trained(tiny_data, tmp_path / "with", "--method", *method, "--forgetting_every", "2")
    measured = [entry for entry in log if "forgetting" in entry]
    assert [entry["step"] for entry in measured] == [2, 4, 5]
    assert measured[0]["forgetting"] > 0
    assert measured[-1]["forgetting"] > 0.001
    assert all(entry["forgetting_stderr"] >= 0 for entry in measured)
    if method == ["full"]:
        return
    without = trained(tiny_data, tmp_path / "without", "--method", *method)
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (log, without)]
    assert losses[0] == losses[1]
    assert "forgetting_every: 2" in (tmp_path / "with" / "recipe.yaml").read_text()
    assert (tmp_path / "with" / "plots" / "forgetting.png").is_file()
    assert "during training" in (tmp_path / "with" / "report.html").read_text()
