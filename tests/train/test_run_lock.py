"""Faults that tests can inject in seconds: two runs in one folder, a damaged checkpoint, a hanging loader, NaN."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, dataloader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import TrainingArguments

from milora_vl.adapter import checkpoints
from milora_vl.adapter.checkpoints import why_incomplete, write_checksums
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import output_problem
from milora_vl.plan.run_lock import FILE, RunLock, require_free
from milora_vl.train import failures, loader_processes, trainer
from milora_vl.train import run as run_module
from milora_vl.train.command import main
from support.checkpoint_files import write_checkpoint
from support.problems import raises_code
from support.programs import Program
from support.train_runs import file_contents, losses, training

HOLDER = """
import sys, time
from pathlib import Path
from milora_vl.plan.run_lock import RunLock
RunLock().take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_training_in_the_folder_is_refused_and_changes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = training(tiny_data, run, "--rank", "4", "--lr_scheduler_type", "constant")
    assert main([*words, "--max_steps", "2"]) == 0
    assert not (run / FILE).exists()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = file_contents(run)
        for resume in ([], ["--resume_from_checkpoint", "auto"]):
            with raises_code("run-in-use", says=f"process {holder.pid} on") as raised:
                main([*words, *resume])
            assert raised.value.first.code == "run-in-use"
        with raises_code("run-in-use", message="another training runs"):
            RunLock().take(run)  # if both found the folder free when they started
        assert file_contents(run) == before
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        require_free(run)
        assert (run / FILE).exists()  # what a killed training leaves locks nobody out
        assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    finally:
        holder.kill()
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


def test_a_child_that_outlives_a_killed_training_does_not_hold_the_lock(tmp_path: Path) -> None:
    script = HOLDER.replace('print("held"', 'import os\nif os.fork() == 0: time.sleep(20); os._exit(0)\nprint("held"')
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    require_free(tmp_path)


def test_a_file_system_without_locks_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuses)
    RunLock().take(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "missing", "shorter"])
def test_a_damaged_file_of_a_checkpoint_is_found_and_the_older_one_used(damage: str, tmp_path: Path) -> None:
    older, newer = (write_checkpoint(tmp_path, step) for step in (2, 4))
    for folder in (older, newer):
        (folder / "milora.json").write_text("{}")
        write_checksums(folder)
    assert (why_incomplete(older), why_incomplete(newer)) == (None, None)
    file = newer / ("milora.json" if damage == "missing" else "adapter_model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(content[:-1])
    else:
        content[-1] ^= 1  # sizes and headers are right
        file.write_bytes(content)
    newest, skipped = checkpoints.latest(tmp_path)
    assert newest == older
    said = {"flipped": "has changed since it was written", "missing": "is missing", "shorter": "is truncated"}
    assert said[damage] in skipped[0][1]


def test_the_checksums_of_a_real_checkpoint_hold_all_its_files(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(training(tiny_data, run, "--rank", "4", "--max_steps", "2", "--save_steps", "1")) == 0
    folder = run / "checkpoint-1"
    suffixes = (".safetensors", ".pt", ".pth", ".bin")
    stored = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in suffixes} | {"milora.json"}
    assert set(dict(json.loads((folder / "checksums.json").read_text()))) == stored
    assert not (run / "checksums.json").exists()
    weights = folder / "optimizer.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 255
    weights.write_bytes(content)
    with raises_code("checkpoint-incomplete", where="--resume_from_checkpoint", message="optimizer.pt has changed"):
        main(training(tiny_data, run, "--rank", "4", "--max_steps", "2", "--resume_from_checkpoint", str(folder)))


class Hangs(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        time.sleep(60)


def test_a_loader_that_hangs_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_processes, "TIMEOUT", 0.5)
    loader = loader_processes.with_timeout(DataLoader(Hangs(), num_workers=1))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UserError) as raised, failures.explained(args):
        next(iter(loader))
    assert raised.value.first.code == "run-loader-hangs"
    assert loader_processes.with_timeout(DataLoader(Hangs())).timeout == 0


def test_a_run_that_was_written_while_another_one_loaded_is_not_overwritten(tiny_data: Path, tmp_path: Path) -> None:
    """Only the first step locks the folder: two jobs that start at the same time both find it free."""
    run = tmp_path / "run"
    words = training(tiny_data, run, "--rank", "4", "--max_steps", "1")
    before: dict[str, bytes] = {}
    adapt = run_module.adapt

    def slow(*arguments: Any) -> Any:
        if not before:
            before["model"] = b""
            assert main(words) == 0
            before.update(file_contents(run))
        return adapt(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "adapt", slow)
        with raises_code("run-exists", where=str(run)):
            main(words)
    del before["model"]
    assert file_contents(run) == before


def test_a_lock_that_its_holder_removes_while_another_one_opens_it_is_not_held_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, opened = RunLock(), os.open
    first.take(tmp_path)

    def opens(*arguments: Any) -> int:
        number = opened(*arguments)
        first.release()  # between the open and the lock of the second one
        return number

    monkeypatch.setattr(os, "open", opens)
    second = RunLock()
    second.take(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / FILE).is_file()
    assert os.path.samestat((tmp_path / FILE).stat(), os.fstat(second._held[0]))  # type: ignore[index]
    second.release()


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Any:
        return torch.full((1000,), index)


def test_stopped_loader_processes_count_as_hung_and_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process may be receiving a batch from one of them, which no timeout of torch covers."""
    monkeypatch.setattr(loader_processes, "TIMEOUT", 2)
    with loader_processes.found_while_waiting():
        batches = iter(loader_processes.with_timeout(DataLoader(Numbers(), num_workers=2)))
        others = iter(loader_processes.with_timeout(DataLoader(Numbers(), num_workers=1)))
        next(batches)
        next(others)
        workers = psutil.Process().children()[-3:]
        for worker in workers:
            worker.suspend()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="timed out after 2 seconds"):
            list(batches)
        del batches, others  # joins their processes
        assert time.monotonic() - start < 30
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_killed_loader_process_is_an_error_where_a_batch_is_awaited(kind: Any) -> None:
    """Elsewhere the error would end a report, or leave a lock of a library held: then the training hangs."""
    inner = signal.getsignal(signal.SIGCHLD)
    with loader_processes.found_while_waiting(streams=True):
        loader = loader_processes.with_timeout(kind(list(range(100)), num_workers=2, prefetch_factor=2))
        batches = iter(loader)
        next(batches)
        os.kill(psutil.Process().children()[-1].pid, signal.SIGKILL)
        time.sleep(1)  # other code of the main process
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            list(batches)
        assert time.monotonic() - start < 30 < loader.timeout
    assert signal.getsignal(signal.SIGCHLD) == inner
    assert "_looks_again" not in DataLoader(range(2), num_workers=1)._get_iterator()._try_get_data.__qualname__


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "Connection refused"), EOFError()])
def test_a_loader_process_that_dies_while_it_sends_is_an_error(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise error

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "_try_get_data", breaks)
    loader = loader_processes.with_timeout(DataLoader(Numbers(), num_workers=1))
    with loader_processes.found_while_waiting(), raises_code("run-loader-died"), failures.explained(args):
        next(iter(loader))


STOPPED = """
import time
from torch.utils.data import DataLoader, Dataset
from milora_vl.train import loader_processes

class Slow(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(0.7)
        return index

loader_processes.TIMEOUT, loader_processes.MP_STATUS_CHECK_INTERVAL = 1.4, 0.7
with loader_processes.found_while_waiting():
    batches = iter(loader_processes.with_timeout(DataLoader(Slow(), num_workers=1)))
    print("waits", flush=True)
    print(len(list(batches)), "batches", flush=True)
"""


def test_a_job_that_was_stopped_longer_than_the_timeout_continues(tmp_path: Path) -> None:
    """A scheduler may stop all processes of a job for hours (SIGSTOP): the loader processes do not hang."""
    log = tmp_path / "log"
    with log.open("w") as file:
        program = Program(["-c", STOPPED], stdout=file, stderr=file, new_session=True)
        try:
            while "waits" not in log.read_text() and program.poll() is None:
                time.sleep(0.01)
            time.sleep(0.3)
            os.killpg(program.pid, signal.SIGSTOP)
            time.sleep(2)
            os.killpg(program.pid, signal.SIGCONT)
            assert program.wait(60) == 0, log.read_text()
        finally:
            program.kill_if_running()
    assert "2 batches" in log.read_text()


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_sigterm_to_all_processes_of_a_job_leaves_the_step_its_batches(kind: Any) -> None:
    """As schedulers and torchrun send it: the run ends its step and saves it, so it needs its loader processes."""
    with loader_processes.found_while_waiting(streams=True):
        loader = loader_processes.with_timeout(kind(list(range(50)), num_workers=2, persistent_workers=True))
        batches = iter(loader)
        for _ in range(2):  # of both processes: they have started
            next(batches)
        workers = psutil.Process().children()[-2:]
        for worker in workers:
            worker.terminate()
        assert len(list(batches)) == 48
        assert all(worker.is_running() for worker in workers)
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_a_batch_that_does_not_fit_into_shared_memory_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In containers, /dev/shm has 64 MB. torch's processes lose the batch, and the main process waits for ever."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    loader = loader_processes.with_timeout(DataLoader(Numbers(), num_workers=1, collate_fn=unsendable))
    with (
        loader_processes.found_while_waiting(),
        raises_code("run-loader-died", hint="--shm-size"),
        failures.explained(args),
    ):
        next(iter(loader))
    assert "cannot send its batch: unable to write to file </torch_1>" in capfd.readouterr().err


class Unsendable:
    def __reduce__(self) -> Any:
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


def unsendable(_: object) -> Unsendable:
    return Unsendable()


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
        with pytest.raises(UserError) as raised:
            main(words)
    assert raised.value.first.code == "train-loss-not-finite"
    newest, _ = checkpoints.latest(run)
    assert newest == run / "checkpoint-3"
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert all(loss == loss for _, loss in losses(run))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EROFS, "path-lost"),
        (errno.ESTALE, "path-lost"),
        (errno.ENOSYS, "path-no-rename"),
        (errno.EXDEV, "path-no-rename"),
    ],
)
def test_a_lost_file_system_and_one_without_rename_are_named(number: int, code: str, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UserError) as raised, failures.explained(args):
        raise OSError(number, os.strerror(number), str(tmp_path / "a"))
    assert (raised.value.first.code, raised.value.exit_code) == (code, 1)
    assert output_problem(OSError(errno.ENOENT, "no", "a"), "b") is None


def test_durations_do_not_come_from_a_clock_that_can_go_backwards() -> None:
    root = Path(__file__).resolve().parents[2]
    folders = ("milora_vl", "data_tools", "eval")
    found = [str(file) for name in folders for file in (root / name).rglob("*.py") if "time.time()" in file.read_text()]
    assert found == []
