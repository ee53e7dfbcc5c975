"""Two trainings in one folder: the second is refused and changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from milora_vl.train import run as run_module
from milora_vl.train.command import main
from milora_vl.train.plan import run_folder
from support.problems import raises_code
from support.train_runs import file_contents, losses, training

HOLDER = """
import sys, time
from pathlib import Path
from milora_vl.train.plan.run_folder import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_training_in_the_folder_is_refused_and_changes_nothing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "WAIT", 0)
    run = tmp_path / "run"
    words = training(tiny_data, run, "--rank", "4", "--lr_scheduler_type", "constant")
    assert main([*words, "--max_steps", "2"]) == 0
    assert not (run / run_folder.LOCK).exists()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = file_contents(run)
        for resume in ([], ["--resume_from_checkpoint", "auto"]):
            with raises_code("run-in-use", message="another training runs"):
                main([*words, *resume])
        with raises_code("run-in-use"):
            run_folder.lock(run)  # if both found the folder free when they started
        assert file_contents(run) == before
        holder.kill()
        holder.wait()
        assert (run / run_folder.LOCK).exists()  # what a killed training leaves locks nobody out
        assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    finally:
        holder.kill()
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


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
