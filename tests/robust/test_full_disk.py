"""A disk that fills up while a cache, answers or a report are written: a small tmpfs, so as root on Linux."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from milora_data.lengths import encoded_lengths
from milora_data.records import Record, Turn
from milora_vl.tiny import tiny_tokenizer
from support.fake_run import make_run
from support.programs import run

Disk = Callable[..., Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    """Return a function that makes a file system of this many bytes, with the content of a folder."""
    disk = tmp_path / "disk"

    def make(size: int, content: Path | None = None) -> Path:
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a file system needs root")
        if content is not None:
            shutil.copytree(content, disk, dirs_exist_ok=True)
        return disk

    yield make
    subprocess.run(["umount", str(disk)], capture_output=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_lengths_that_cannot_be_cached_are_counted_each_time(small_disk: Disk) -> None:
    disk = small_disk(16384)
    fill(disk)
    records = [Record(str(i), (), (Turn("user", "Say it."), Turn("assistant", "It."))) for i in range(3)]
    counted = encoded_lengths(
        records, tiny_tokenizer(), template="vicuna_v1", image_tokens=0, beside=disk / "train.json"
    )
    assert len(counted) == 3
    assert [file.name for file in disk.iterdir()] == ["filler"]


def test_a_report_that_does_not_fit_keeps_the_old_one(small_disk: Disk, tmp_path: Path) -> None:
    made = make_run(tmp_path / "made", num_questions=24)
    (made / "report.html").write_text("old")
    disk = small_disk(4_000_000, made)
    fill(disk)
    done = run(["milora_vl.report", str(disk)])
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert (disk / "report.html").read_text() == "old"
