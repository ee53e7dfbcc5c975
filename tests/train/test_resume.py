"""Kill a training with SIGKILL, resume it: later losses and final weights are those of an uninterrupted run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from milora_vl.train.command import main
from support.programs import Program
from support.train_runs import METHODS, WEIGHTS, losses, training


def kill_when(command: list[str], folder: Path, log: Path) -> None:
    """Start the command and kill it as soon as `folder` exists: in the middle of writing that checkpoint."""
    with log.open("w") as stream:
        process = Program(command, stdout=stream, stderr=stream)
        while not folder.exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.0005)
        process.kill()
        assert process.wait() == -signal.SIGKILL


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("full", "projector")]


@pytest.mark.parametrize("method", ["milora", *SLOW])
def test_a_killed_run_resumes_with_the_same_losses(method: str, tiny_data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    extra = ["--method", method, *METHODS[method], "--eval_data_path", str(tiny_data / "val.json")]
    assert main(training(tiny_data, whole, *extra)) == 0

    last = killed / "checkpoint-4"
    kill_when(["milora_vl.train", *training(tiny_data, killed, *extra)], last, tmp_path / "log.txt")
    state = last / "trainer_state.json"
    if state.exists():  # the kill came too late; cut the checkpoint off as an earlier one would have
        state.write_bytes(state.read_bytes()[:100])
    assert main(training(tiny_data, killed, *extra, "--resume_from_checkpoint", "auto")) == 0

    assert losses(killed) == losses(whole)
    weights = WEIGHTS.get(method, "adapter_model.safetensors")
    expected, found = load_file(whole / weights), load_file(killed / weights)
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    assert (killed / "incomplete-checkpoint-4").is_dir()
    assert main(training(tiny_data, killed, *extra, "--resume_from_checkpoint", "auto")) == 0  # finished: nothing to do
