"""What the training loop shows: short lines, bars on a terminal alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_vl.train.callbacks import log_line
from milora_vl.train.command import main
from support.problems import raises_code
from support.programs import run as run_program


def test_a_log_entry_is_one_short_line() -> None:
    logs = {
        "loss": 5.248, "grad_norm": 9.5, "learning_rate": 0.0009397, "tokens_per_second": 1175.9,
        "padding": 0.0351, "supervised_tokens": 164, "skipped_records": 0,
        "learning_rate/language": 0.0009397, "epoch": 0.01196,
    }  # fmt: skip
    line = "step 5/2,000  loss 5.2480  rate 0.00094  gradient 9.5  1,176 tokens/s  epoch 0.012"
    assert log_line(logs, 5, 2000) == line
    assert "2 records skipped" in log_line(logs | {"skipped_records": 2}, 5, 2000)
    assert log_line({"loss": 0.0}, 1, 2) == "step 1/2  loss 0.0000"
    assert log_line({"eval_loss": 0.95, "eval_runtime": 20.1}, 20, 20) == "step 20/20  loss on held-out records 0.9500"
    assert log_line({"train_runtime": 103.3, "train_loss": 2.447}, 7, 20) == "7 steps in 103 s, loss 2.4470 on average"
    ended = {"train_runtime": 103.3, "train_loss": 2.447}
    assert log_line(ended, 7, 20, done=3) == "3 steps in 103 s, loss 2.4470 on average"  # the others: before a resume
    assert log_line({"loss": 1.0}, 60, 150, done=10, seconds=20).endswith("loss 1.0000  3.0 min left")
    assert log_line({"loss": 1.0}, 150, 150, done=100, seconds=20) == "step 150/150  loss 1.0000"
    assert "left" not in log_line({"eval_loss": 1.0}, 60, 150, done=10, seconds=20)


def test_a_training_without_data_says_only_that(capsys: pytest.CaptureFixture[str]) -> None:
    with raises_code("data-no-path"):
        main(["--model", "tiny", "--rank", "4", "--output_dir", "none"])
    assert capsys.readouterr().err == ""


def test_a_training_into_a_pipe_writes_plain_lines_to_stderr(tiny_data: Path, tmp_path: Path) -> None:
    done = run_program(
        [
            "milora_vl.train", "--model", "tiny", "--rank", "4", "--max_steps", "2",
            "--logging_steps", "1",
            "--data_path", str(tiny_data / "train.json"), "--image_folder", str(tiny_data / "images"),
            "--eval_data_path", str(tiny_data / "train.json"), "--use_cpu", "--output_dir", str(tmp_path / "run"),
        ]
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    assert "Warning" not in done.stderr
    shown = done.stderr.splitlines()
    assert any(line.startswith("step 1/2  loss ") and line.endswith(" s left") for line in shown)
    assert any(line.startswith("step 2/2  loss ") for line in shown)
    assert any(line.startswith("step 2/2  loss on held-out records ") for line in shown)
    assert not any(line.startswith("{'") for line in shown)  # as Hugging Face prints a log entry
    assert done.stderr.rstrip().splitlines()[-1].startswith("next ")
