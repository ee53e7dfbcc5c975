"""A run that is killed in the middle of an epoch, with loader processes at work, goes on with the records due."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from milora_vl.train.command import main
from support.programs import Program
from support.train_runs import lengthen_data, losses, training

ARRANGED = [
    pytest.param(["--train_sampling_strategy", "group_by_length"], id="grouped"),
    pytest.param(["--streaming", "--shuffle_buffer", "16"], id="streamed", marks=pytest.mark.slow),
    pytest.param(["--streaming", "--shuffle_buffer", "0"], id="streamed-in-order", marks=pytest.mark.slow),
]


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are of POSIX")
@pytest.mark.parametrize("arranged", ARRANGED)
def test_it_goes_on_with_exactly_the_records_that_were_due(
    arranged: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    lengthen_data(tiny_data, 228)  # 60 steps an epoch
    extra = ["--rank", "4", "--dropout", "0", "--max_steps", "18", "--save_steps", "3", "--dataloader_num_workers", "2"]
    extra += arranged
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = Program(["milora_vl.train", *training(tiny_data, killed, *extra)], new_session=True)
    while not (killed / "checkpoint-6").is_dir() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "trainer_state.json").exists()
    assert main(training(tiny_data, killed, *extra, "--resume_from_checkpoint", "auto")) == 0
    assert main(training(tiny_data, whole, *extra)) == 0
    assert [step for step, _ in losses(killed)] == list(range(1, 19))
    assert losses(killed) == losses(whole)


def test_a_run_that_was_killed_after_its_last_step_makes_no_other(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(training(tiny_data, run, "--rank", "4")) == 0
    before = load_file(run / "adapter_model.safetensors")
    for name in ("trainer_state.json", "adapter_model.safetensors"):
        (run / name).unlink()
    for choice in ("auto", "True"):
        assert main(training(tiny_data, run, "--rank", "4", "--resume_from_checkpoint", choice)) == 0
        assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]
        after = load_file(run / "adapter_model.safetensors")
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert not (run / "checkpoint-7").exists()
