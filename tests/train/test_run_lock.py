"""Two trainings in one folder: the second is refused and changes nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from milora_vl.plan.run_lock import FILE, RunLock, require_free
from milora_vl.train import run as run_module
from milora_vl.train.command import main
from support.problems import raises_code
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
