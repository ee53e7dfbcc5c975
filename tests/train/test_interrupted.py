"""Trainings that are killed, stopped by SIGTERM or fail, and resume with the losses of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import TrainingArguments

from milora_vl.core.adapter import folders
from milora_vl.core.adapter.folders import why_incomplete
from milora_vl.train import data, trainer
from milora_vl.train.__main__ import main
from support.problems import raises_code
from support.programs import Program
from support.train_runs import METHODS, WEIGHTS, lengthen_data, losses, training

RESUME = ["--resume_from_checkpoint", "auto"]


def require_equal(first: Path, second: Path, weights: str = "adapter_model.safetensors") -> None:
    """Assert that two runs have the same losses and final weights."""
    assert losses(first) == losses(second)
    expected, found = load_file(first / weights), load_file(second / weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


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
def test_a_run_that_was_killed_while_it_saved_resumes_with_the_same_losses(
    method: str, tiny_data: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    extra = [*METHODS[method], "--eval_data_path", str(tiny_data / "val.json")]
    assert main(training(tiny_data, whole, *extra)) == 0

    last = killed / "checkpoint-4"
    kill_when(["milora_vl.train", *training(tiny_data, killed, *extra)], last, tmp_path / "log.txt")
    state = last / "trainer_state.json"
    if state.exists():  # the kill came too late; cut the checkpoint off as an earlier one would have
        state.write_bytes(state.read_bytes()[:100])
    assert main(training(tiny_data, killed, *extra, *RESUME)) == 0

    require_equal(whole, killed, WEIGHTS.get(method, "adapter_model.safetensors"))
    assert (killed / "incomplete-checkpoint-4").is_dir()
    assert main(training(tiny_data, killed, *extra, *RESUME)) == 0  # finished: nothing to do


ORDERS = [
    pytest.param(["--train_sampling_strategy", "group_by_length"], id="grouped"),
    pytest.param(["--streaming", "--shuffle_buffer", "16"], id="streamed", marks=pytest.mark.slow),
    pytest.param(["--streaming", "--shuffle_buffer", "0"], id="streamed-in-order", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_with_loader_processes_that_was_killed_in_an_epoch_continues_with_the_next_records(
    order: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    lengthen_data(tiny_data, 228)  # 60 steps an epoch
    extra = ["--rank", "4", "--dropout", "0", "--max_steps", "18", "--save_steps", "3", "--dataloader_num_workers", "2"]
    extra += order
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = Program(["milora_vl.train", *training(tiny_data, killed, *extra)], new_session=True)
    while not (killed / "checkpoint-6").is_dir() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(training(tiny_data, killed, *extra, *RESUME)) == 0
    assert main(training(tiny_data, whole, *extra)) == 0
    assert [step for step, _ in losses(killed)] == list(range(1, 19))
    require_equal(whole, killed)


def test_a_run_that_was_killed_after_its_last_step_makes_no_other(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(training(tiny_data, run, "--rank", "4")) == 0
    before = load_file(run / "adapter_model.safetensors")
    for name in ("trainer_state.json", "adapter_model.safetensors"):
        (run / name).unlink()
    assert main(training(tiny_data, run, "--rank", "4", *RESUME)) == 0
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]
    after = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not (run / "checkpoint-7").exists()


def test_sigterm_saves_and_the_resumed_run_continues_from_there(tiny_data: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    extra = ["--rank", "4", "--save_steps", "100", "--max_steps", "20"]
    before, ended = signal.getsignal(signal.SIGTERM), threading.Event()

    def terminate() -> None:
        while signal.getsignal(signal.SIGTERM) == before:
            if ended.wait(0.001):
                return
        if not ended.wait(0.1):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    try:
        with raises_code("", message="which is saved") as error:
            main(training(tiny_data, stopped, *extra))
    finally:
        ended.set()  # after a training that fails earlier it must not wait for the handler of the next one
    assert error.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert [why_incomplete(folder) for folder in stopped.glob("checkpoint-*")] == [None]
    assert not (stopped / "adapter_model.safetensors").exists()
    assert main(training(tiny_data, stopped, *extra, *RESUME)) == 0
    assert main(training(tiny_data, whole, *extra)) == 0
    require_equal(whole, stopped)


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sigterm_to_all_processes_of_a_job_saves(streamed: bool, tiny_data: Path, tmp_path: Path) -> None:
    """As schedulers and torchrun send it: the run ends its step and saves it, so it needs its loader processes."""
    lengthen_data(tiny_data, 228)
    run = tmp_path / "run"
    extra = ["--rank", "4", "--save_steps", "3", "--max_steps", "60", "--dataloader_num_workers", "2"]
    extra += ["--streaming"] if streamed else []
    process = Program(["milora_vl.train", *training(tiny_data, run, *extra)], new_session=True)
    while not (run / "checkpoint-3" / "trainer_state.json").is_file() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    newest, _ = folders.latest(run)
    assert newest is not None
    assert 3 < folders.step_of(newest) < 60
    with pytest.raises(ProcessLookupError):  # no loader process is left
        os.killpg(process.pid, 0)


class Dies(torch.utils.data.Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def __len__(self) -> int:
        return 1


class Hangs(Dies):
    def __getitem__(self, index: int) -> Any:
        time.sleep(60)


# After a process that dies, torch's handler of SIGCHLD raises an error in the line that runs then. So the wait for it
# must not time out first.
@pytest.mark.parametrize(("dataset", "timeout"), [(Dies(), 300.0), (Hangs(), 0.5)], ids=["dies", "hangs"])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_loader_process_that_dies_or_hangs_ends_the_run(
    kind: Any, dataset: Dies, timeout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "TIMEOUT", timeout)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", dataloader_num_workers=1)
    with pytest.raises(RuntimeError, match="DataLoader"):
        next(iter(kind(dataset, **data.process_settings(args))))


def test_a_loss_that_becomes_nan_ends_the_run_before_a_checkpoint_of_it(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = training(tiny_data, run, "--rank", "4", "--save_steps", "1")
    compute = trainer.MiloraTrainer.compute_loss

    def breaks(self: Any, *arguments: Any, **named: Any) -> Any:
        loss = compute(self, *arguments, **named)
        return loss * float("nan") if self.state.global_step == 3 and self.model.training else loss

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MiloraTrainer, "compute_loss", breaks)
        with raises_code("", message="loss"):
            main(words)
    newest, _ = folders.latest(run)
    assert newest == run / "checkpoint-3"
    assert main([*words, *RESUME]) == 0
    assert all(loss == loss for _, loss in losses(run))
