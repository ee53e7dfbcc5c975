"""A whole sweep on the tiny model, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milora_vl.common.errors import UserError
from milora_vl.sweep import __main__ as sweep
from support.eval_questions import write_questions

RECIPE = """
model: tiny
data: {{path: {data}/train.json, image_folder: {data}/images, eval_path: {data}/val.json}}
policy:
  - {{modules: language, method: milora, protect: 0, rank: 4, alpha: 4, learning_rate: 1.0e-3}}
  - {{modules: projector, method: full, learning_rate: 1.0e-3}}
train:
  {{max_steps: 6, per_device_train_batch_size: 4, use_cpu: true, eval_strategy: steps, eval_steps: 3, save_steps: 3}}
sweep: {{suite: emoji, data: {data}, limit: 10}}
"""


def write_recipe(folder: Path) -> Path:
    """Write a recipe with its data."""
    data = write_questions(folder / "data")
    rows = json.loads((data / "test.json").read_text())
    (data / "train.json").write_text(json.dumps(rows))
    (data / "val.json").write_text(json.dumps(rows[:6]))
    (folder / "r.yaml").write_text(RECIPE.format(data=data))
    return folder / "r.yaml"


@pytest.mark.usefixtures("forked_programs")
def test_what_a_first_cell_has_left_is_no_hindrance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan makes a dry run, which must not look like a resumed training in the cell's folder."""
    run = tmp_path / "out" / "cells" / "milora-lr0.001-seed42"
    (run / "checkpoint-3").mkdir(parents=True)
    (run / "checkpoint-3" / "trainer_state.json").write_text("{}")
    given = ["--recipe", str(write_recipe(tmp_path)), "--methods", "milora", "--lrs", "1e-3", "--seeds", "1"]
    assert sweep.main([*given, "--output_dir", str(tmp_path / "out"), "--plan"]) == 0
    assert "1 cell, 0 done, 0 failed, 1 to run" in capsys.readouterr().err


@pytest.mark.usefixtures("forked_programs")
def test_the_plan_shows_what_a_training_would_warn_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + "\ncalibration: {samples: 8}\n")
    given = ["--recipe", str(recipe), "--methods", "milora-paper", "--lrs", "1e-3", "--seeds", "1", "--plan"]
    assert sweep.main([*given, "--output_dir", str(tmp_path / "out")]) == 0
    assert "warning: the calibration has no effect" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("modules: language", "modules: nothing"))
    with pytest.raises(UserError) as error:
        sweep.main(given)
    assert error.value.first.code == "sweep-cell-cannot-run"


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    command = [
        sys.executable, "-m", "milora_vl.sweep", "--recipe", str(recipe), "--methods", "milora,full",
        "--lrs", "1e-3,1e-2", "--seeds", "1", "--jobs", "2", "--output_dir", str(out),
    ]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ})
    until = time.monotonic() + 300
    while not list((out / "cells").glob("*.json")) and time.monotonic() < until:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)  # its commands continue; the next sweep waits for them
    first.wait()
    kept = {file.name: file.stat().st_mtime_ns for file in (out / "cells").glob("*.json")}
    assert 0 < len(kept) < 4
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} done" in done.stderr
    files = {file.name: file.stat().st_mtime_ns for file in (out / "cells").glob("*.json")}
    assert len(files) == 4
    assert {name: files[name] for name in kept} == kept
    assert "4 of 4 cells are done" in (out / "sweep.html").read_text()
    again = subprocess.run(command, capture_output=True, text=True)
    assert "nothing is left to run" in again.stderr
