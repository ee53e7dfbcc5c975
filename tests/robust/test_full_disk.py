"""A disk that fills up while a cache, answers or a report are written: a small tmpfs, so as root on Linux."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from milora_data.batches.lengths import encoded_lengths
from milora_data.records.record import Record, Turn
from milora_eval import run as evaluate
from milora_eval.answers.store import read_lines
from milora_vl.tiny import tiny_tokenizer
from milora_vl.train.command import main as train
from support.eval_questions import write_questions
from support.fake_run import make_run
from support.problems import raises_code
from support.programs import run
from support.train_runs import losses, training

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


def test_a_checkpoint_that_does_not_fit_leaves_no_empty_log(small_disk: Disk, tiny_data: Path) -> None:
    """The run then writes its losses, on a disk that the checkpoint has filled."""
    run_folder = small_disk(260_000) / "run"
    with raises_code("disk-full", where=str(run_folder)):
        train(training(tiny_data, run_folder, "--rank", "4", "--save_steps", "6"))
    assert [file.name for file in run_folder.iterdir() if file.is_file() and file.stat().st_size == 0] == []
    assert list(run_folder.glob(".*")) == []


def test_features_that_do_not_fit_are_told_and_the_complete_ones_are_used(
    small_disk: Disk, tiny_data: Path, tmp_path: Path
) -> None:
    """The announced size, in bytes, fits; the file system needs a page for each file."""
    words = ["--rank", "4", "--dropout", "0", "--max_steps", "2"]
    assert train(training(tiny_data, tmp_path / "whole", *words, "--feature_cache", str(tmp_path / "cache"))) == 0
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    pages = [-(-file.stat().st_size // 4096) for file in files]
    disk = small_disk(4096 * (sum(pages) - 2 * max(pages)))
    cached = [*words, "--feature_cache", str(disk)]
    with raises_code("disk-full", where="--feature_cache"):
        train(training(tiny_data, tmp_path / "run", *cached))
    assert not (tmp_path / "run").exists()
    left = [file for file in disk.rglob("*") if file.is_file()]
    assert 0 < len(left) < len(files)
    assert {file.suffix for file in left} == {".safetensors"}  # no partial file
    kept = {file: file.stat().st_mtime_ns for file in left}
    subprocess.run(["mount", "-o", "remount,size=1000000", str(disk)], check=True)
    assert train(training(tiny_data, tmp_path / "run", *cached)) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_an_evaluation_on_a_full_disk_goes_on_without_losing_or_doubling_an_answer(
    small_disk: Disk, tmp_path: Path, tiny_llava: Callable[..., tuple[Any, Any]]
) -> None:
    data, model = write_questions(tmp_path / "emoji"), tiny_llava()

    def answers(folder: Path) -> list[dict[str, Any]]:
        return read_lines(folder / "eval" / "emoji" / "final" / "predictions.jsonl")

    assert evaluate(*model, ["emoji"], data_dir=data, output_dir=tmp_path, batch_size=4) is not None
    disk = small_disk(8192)
    asked = 0
    for size in (8192, 12288, 16384):  # the last is enough for the answers, but not for their complete file
        subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
        with pytest.raises(OSError, match="No space left on device"):
            evaluate(*model, ["emoji"], data_dir=data, output_dir=disk, batch_size=4)
        kept = {line["key"]: line for line in answers(disk)}
        assert len(kept) == len(answers(disk)) >= asked
        assert all(line in answers(tmp_path) for line in kept.values())
        asked = len(kept)
    assert asked > 0
    subprocess.run(["mount", "-o", "remount,size=1000000", str(disk)], check=True)
    results = evaluate(*model, ["emoji"], data_dir=data, output_dir=disk, batch_size=4)
    assert results is not None
    assert results["asked"] < 22
    assert answers(disk) == answers(tmp_path)
