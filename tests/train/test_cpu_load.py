"""A run on a CPU computes on the cores that other programs leave free."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
import torch

from milora_vl.train import cpu_load
from milora_vl.train.cpu_load import INTERVAL, FreeCores, _Times, may_choose_threads, threads_for

MEASURE = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # before torch counts the cores
import torch
from milora_vl.train.cpu_load import FreeCores, may_choose_threads
before = torch.get_num_threads()
if may_choose_threads("cpu", 1):
    print(FreeCores().describe())
print(before, torch.get_num_threads())
"""


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cpu_load.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("variable", [None, "OMP_NUM_THREADS"])
def test_a_busy_core_is_left_to_the_other_program_unless_the_user_sets_threads(variable: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in cpu_load.VARIABLES}
    environment |= {variable: "2"} if variable else {}
    core = str(min(os.sched_getaffinity(0)))
    other = subprocess.Popen(["taskset", "-c", core, sys.executable, "-c", "while True: pass"])  # not its child
    try:
        command = [sys.executable, "-c", MEASURE]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        other.kill()
        other.wait()
    *said, numbers = done.stdout.splitlines()
    before, after = map(int, numbers.split())
    if variable:
        assert (said, before, after) == ([], 2, 2)
    elif before == 2:  # 1 if both are one physical core
        assert after == 1
        assert "of 2 cores: this run computes with 1 thread (" in said[0]


def test_the_time_of_own_processes_is_own_while_they_run_and_after_they_end() -> None:
    """Else the loader processes of an epoch would look like other programs when they end."""
    cores = FreeCores.__new__(FreeCores)
    cores.process, cores.cores = psutil.Process(), [0]
    before = cores._times().own
    worker = subprocess.Popen(
        [sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass\nprint(1, flush=True)\ninput()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert worker.stdout is not None
    worker.stdout.readline()
    assert cores._times().own - before > 0.4
    worker.communicate(b"\n")
    assert cores._times().own - before > 0.4


def test_the_threads_are_ours_to_choose_only_as_torch_starts(
    no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_load, "_own_cores", lambda process: list(range(8)))
    monkeypatch.setattr(cpu_load.psutil, "cpu_count", lambda logical: 4)
    for threads, ours in ((8, True), (4, True), (6, False), (1, False)):
        monkeypatch.setattr(cpu_load.torch, "get_num_threads", lambda threads=threads: threads)
        assert may_choose_threads("cpu", 1) == ours
    monkeypatch.setattr(cpu_load.torch, "get_num_threads", lambda: 8)
    assert not may_choose_threads("cuda", 1)
    assert not may_choose_threads("cpu", 2)  # torchrun gives each process one thread
    monkeypatch.setenv("MKL_NUM_THREADS", "8")
    assert not may_choose_threads("cpu", 1)


@pytest.mark.parametrize("cores", [2, 4, 64])
def test_free_cores_have_no_thread_less_than_is_best(cores: int) -> None:
    assert threads_for(0.0, cores, cores) == cores
    assert threads_for(1.0, cores, cores) == cores - 1
    assert threads_for(10.0 * cores, cores, cores) == 1
    assert threads_for(0.0, cores, cores // 2) == cores // 2


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_fall_at_once_and_rise_when_two_measurements_agree(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    clock, used = 0.0, 0.0
    monkeypatch.setattr(cpu_load, "_own_cores", lambda process: [0, 1])
    monkeypatch.setattr(cpu_load.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cpu_load.time, "monotonic", lambda: clock)
    monkeypatch.setattr(FreeCores, "_times", lambda self: _Times(clock, used + 2 * clock, 2 * clock))

    def wait(seconds: float, others: float) -> tuple[bool, int]:
        nonlocal clock, used
        clock, used = clock + seconds, used + others * seconds
        return cores.follow(), torch.get_num_threads()

    monkeypatch.setattr(FreeCores, "_measure", lambda self: 0.0)
    cores = FreeCores()
    monkeypatch.undo()
    monkeypatch.setattr(cpu_load.time, "monotonic", lambda: clock)
    monkeypatch.setattr(FreeCores, "_times", lambda self: _Times(clock, used + 2 * clock, 2 * clock))
    assert wait(INTERVAL / 2, 2.0) == (False, 2)  # too early to measure
    assert wait(INTERVAL, 1.0) == (True, 1)
    assert wait(INTERVAL, 0.0) == (False, 1)
    assert wait(INTERVAL, 1.0) == (False, 1)
    assert wait(INTERVAL, 0.0) == (False, 1)
    assert wait(INTERVAL, 0.1) == (True, 2)
