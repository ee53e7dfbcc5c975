"""A process that answers late or not at all, and machines that see different folders."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from milora_vl.plan import resuming
from support.launched import ENVIRONMENT, free_port
from support.problems import raises_code
from support.programs import Program
from support.train_runs import losses, training

TWO = ["--rank", "4", "--dropout", "0", "--per_device_train_batch_size", "2"]


@contextmanager
def two_ranks(words: list[str], folder: Path) -> Iterator[list[Program]]:
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(2):
        with (folder / f"rank{rank}.log").open("w") as log:
            env = ENVIRONMENT | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(Program(["milora_vl.train", *words], cwd=folder, env=env, stdout=log, stderr=log))
    try:
        yield started
    finally:
        for program in started:
            program.kill_if_running()


def wait_for(file: Path) -> None:
    end = time.monotonic() + 300
    while not file.is_file():
        assert time.monotonic() < end, f"{file} is not written"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_process_that_stands_still_for_20_seconds_changes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    for run, seconds in (("still", 20), ("plain", 0)):
        with two_ranks(training(tiny_data, tmp_path / run, *TWO), tmp_path) as ranks:
            wait_for(tmp_path / run / "checkpoint-2" / "trainer_state.json")
            os.kill(ranks[1].pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(ranks[1].pid, signal.SIGCONT)
            assert [program.wait(timeout=300) for program in ranks] == [0, 0]
    assert losses(tmp_path / "still") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_the_others_report_a_process_that_does_not_answer(tiny_data: Path, tmp_path: Path) -> None:
    """Also on CPUs, where Hugging Face ignores --ddp_timeout."""
    run = tmp_path / "run"
    words = training(tiny_data, run, *TWO, "--ddp_timeout", "5", "--format", "json")
    with two_ranks(words, tmp_path) as ranks:
        wait_for(run / "checkpoint-2" / "trainer_state.json")
        os.kill(ranks[1].pid, signal.SIGSTOP)
        assert ranks[0].wait(timeout=120) == 1
    printed = (tmp_path / "rank0.log").read_text()
    assert "another process of this run does not answer" in printed
    assert "Traceback" not in printed
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_machines_that_find_different_checkpoints_do_not_resume() -> None:
    resuming.require_same_checkpoint(Path("run"), ["checkpoint-2", "checkpoint-2"])
    with raises_code("resume-other-checkpoints", message="rank 0: checkpoint-2, rank 1: none") as caught:
        resuming.require_same_checkpoint(Path("run"), ["checkpoint-2", None])
    assert caught.value.problems[0].code == "resume-other-checkpoints"
