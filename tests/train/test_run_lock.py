"""Two trainings in one folder: the second is refused and changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from milora_vl.train import folder
from milora_vl.train.command import main
from support.problems import raises_code
from support.train_runs import file_contents, losses, training

HOLDER = """
import sys, time
from pathlib import Path
from milora_vl.train.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_training_in_the_folder_is_refused_and_changes_nothing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "WAIT", 0)
    run = tmp_path / "run"
    words = training(tiny_data, run, "--rank", "4", "--lr_scheduler_type", "constant")
    assert main([*words, "--max_steps", "2"]) == 0
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = file_contents(run)
        with raises_code("run-in-use", message="another training runs"):
            main([*words, "--resume_from_checkpoint", "auto"])
        assert file_contents(run) == before
        holder.kill()
        holder.wait()
        assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    finally:
        holder.kill()
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_cannot_be_created_is_refused_before_anything_loads(tiny_data: Path) -> None:
    with raises_code("", where="--output_dir", message="/proc/x"):
        main(training(tiny_data, Path("/proc/x"), "--rank", "4"))
