"""A system that fails in the middle of a training: read-only disk, slow disk, a clock that runs backwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from milora_vl.adapter.checkpoints import remove_oldest, step_of, why_incomplete
from milora_vl.train.command import main
from support.checkpoint_files import write_checkpoint
from support.launched import ENVIRONMENT
from support.problems import raises_code
from support.programs import Program
from support.train_runs import losses, read_json, training

FLAGS = ["--rank", "4", "--lr_scheduler_type", "constant"]
RESUME = ["--resume_from_checkpoint", "auto"]
SHIM = Path(__file__).parents[1] / "support" / "faulty_system.c"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """Return the folder of an ext4 file system in a file, how it fails, and how it is repaired; needs root."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(1 << 26)
    made = subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True) if shutil.which("mkfs.ext4") else None
    mount = ["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)]
    if made is None or made.returncode or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root and mkfs.ext4")
    found = subprocess.run(["findmnt", "-no", "SOURCE", str(folder)], capture_output=True, text=True)
    device = Path(found.stdout.strip()).name
    trigger = Path(f"/sys/fs/ext4/{device}/trigger_fs_error")

    def repair() -> None:
        subprocess.run(["umount", str(folder)], check=True)
        subprocess.run(["e2fsck", "-fy", str(image)], capture_output=True)
        subprocess.run(mount, check=True)

    try:
        if not trigger.exists():
            pytest.skip("this kernel cannot make a file system fail")
        yield folder, lambda: subprocess.run(["sh", "-c", f"echo 1 > {trigger}"], check=True), repair  # type: ignore[misc]
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True)


def wait_for(file: Path, program: Program | subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not file.is_file():
        assert program.poll() is None, "the training has ended"
        assert time.monotonic() < end, f"{file} is not written"
        time.sleep(0.01)


def test_a_disk_that_becomes_read_only_ends_the_run_and_keeps_its_last_checkpoint(
    disk: tuple[Path, Callable[[], None], Callable[[], None]], tiny_data: Path, tmp_path: Path
) -> None:
    folder, fails, repair = disk
    run, log = folder / "run", tmp_path / "log"
    with log.open("w") as file:
        program = Program(["milora_vl.train", *training(tiny_data, run, *FLAGS, "--max_steps", "500")], stderr=file)
    try:
        wait_for(run / "checkpoint-2" / "trainer_state.json", program)
        subprocess.run(["sync", "--file-system", str(folder)], check=True)
        fails()
        assert program.wait(timeout=120) == 1
    finally:
        program.kill_if_running()
    said = log.read_text()
    assert "the file system fails: Read-only file system" in said
    assert "--resume_from_checkpoint auto" in said
    assert "Traceback" not in said
    repair()
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with raises_code("path-not-writable", where="--output_dir"):
        main(training(tiny_data, run, *FLAGS, *RESUME))
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    last = max(map(step_of, run.glob("checkpoint-*")))
    again = ["--max_steps", str(last + 4)]
    assert main(training(tiny_data, run, *FLAGS, *RESUME, *again)) == 0
    assert main(training(tiny_data, tmp_path / "whole", *FLAGS, *again)) == 0
    assert losses(run) == losses(tmp_path / "whole")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of the library that makes the system faulty."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("this needs a C compiler, on Linux")
    library = tmp_path_factory.mktemp("shim") / "faulty_system.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl"], check=True)
    return str(library)


def start(words: list[str], shim: str, log: Path, **faults: str) -> subprocess.Popen[str]:
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "milora_vl.train", *words],
            env={**ENVIRONMENT, "LD_PRELOAD": shim, **faults},
            stdout=file,
            stderr=file,
            text=True,
        )


@pytest.mark.slow
def test_a_clock_that_runs_backwards_changes_nothing(shim: str, tiny_data: Path, tmp_path: Path) -> None:
    held_out = ["--eval_data_path", str(tiny_data / "val.json"), "--eval_strategy", "steps", "--eval_steps", "3"]
    words = [*FLAGS, *held_out, "--save_total_limit", "1"]
    program = start(training(tiny_data, tmp_path / "run", *words), shim, tmp_path / "log", CLOCK_BACKWARDS="100")
    assert program.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert main(training(tiny_data, tmp_path / "plain", *words)) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    environment = read_json(tmp_path / "run", "environment.json")
    assert environment["finished"] < environment["started"]  # the clock did run backwards
    assert environment["seconds"] > 0
    log = read_json(tmp_path / "run", "trainer_state.json")["log_history"]
    durations = {
        name: value for entry in log for name, value in entry.items() if "runtime" in name or "per_sec" in name
    }
    assert durations.keys() >= {"train_runtime", "eval_runtime", "train_steps_per_second"}
    assert min(durations.values()) > 0
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_old_checkpoints_are_told_by_their_steps_and_not_by_the_clock(tmp_path: Path) -> None:
    for number, step in enumerate((8, 2, 4, 6)):  # 8 is of an attempt before the resume from 2
        os.utime(write_checkpoint(tmp_path, step), (1e9 - number, 1e9 - number))

    def left(limit: int | None, best: int | None = None) -> list[int]:
        remove_oldest(tmp_path, 6, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
        return sorted(map(step_of, tmp_path.glob("checkpoint-*")))

    assert left(None) == left(0) == left(-1) == left(4) == [2, 4, 6, 8]
    assert left(3) == [2, 4, 6]
    assert left(1, best=2) == [2, 6]
    assert left(1) == [6]


@pytest.mark.slow
def test_a_slow_disk_changes_nothing_and_a_kill_while_it_writes_costs_one_checkpoint(
    shim: str, tiny_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    slow = {"SLOW_FOLDER": str(run), "SLOW_BYTES": "1"}  # a megabyte a second
    program = start(training(tiny_data, run, *FLAGS), shim, log, **slow)
    wait_for(run / "checkpoint-2" / "trainer_state.json", program)
    while not (run / "checkpoint-4").exists():
        assert program.poll() is None, log.read_text()[-3000:]
        time.sleep(0.001)
    program.kill()
    program.wait()
    assert why_incomplete(run / "checkpoint-4") is not None
    assert start(training(tiny_data, run, *FLAGS, *RESUME), shim, log, **slow).wait(timeout=300) == 0
    assert "incomplete-checkpoint-4" in log.read_text()
    assert main(training(tiny_data, tmp_path / "plain", *FLAGS)) == 0
    assert losses(run) == losses(tmp_path / "plain")
