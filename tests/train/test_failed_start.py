"""A run that fails before its first step leaves nothing behind, and nothing of an earlier run is changed by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from milora_vl.common.errors import UserError
from milora_vl.train.__main__ import main
from support.launched import results_of_two
from support.train_runs import file_contents, training

EARLY = {
    "pictures in tiles for a model without": (["--image_aspect_ratio", "anyres"], "sees a picture once"),
    "an optimizer whose package is missing": (["--optim", "grokadamw"], "install grokadamw"),
    "an optimizer with its own groups": (["--optim", "galore_adamw"], "makes its own parameter groups"),
}  # fmt: skip


def break_pictures(data: Path) -> None:
    for picture in (data / "images").iterdir():
        picture.write_bytes(b"no picture")


def fails(data: Path, run: Path, *flags: str) -> str:
    rank = [] if "--policy" in flags else ["--method", "lora", "--rank", "4"]
    with pytest.raises(UserError) as error:
        main(training(data, run, *rank, *flags))
    return str(error.value)


def test_nothing_is_left_of_a_run_that_made_no_step(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    break_pictures(tiny_data)
    assert "cannot read this picture" in fails(tiny_data, Path("runs/method/time"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("reason", EARLY)
def test_it_is_found_before_the_model_loads(
    reason: str, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags, said = EARLY[reason]
    assert said in fails(tiny_data, tmp_path / "run", *flags)
    assert "loading" not in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


ALONE = """
import json, os, sys
os.environ["MILORA_CACHE"] = "cache"  # without a calibration of another run
from contextlib import nullcontext
from unittest.mock import patch
import torch.distributed as dist
from milora_vl.common.errors import UserError
from milora_vl.train import start
from milora_vl.train.__main__ import main

def fails(*_, **__):
    raise RuntimeError("no memory left")

def spoils(C, rows):
    C.fill_(float("nan"))

start.rows_at_once = lambda *_: 1  # so that each process writes texts
is_odd, other, good, milora = os.environ["RANK"] == "1", *json.loads(sys.argv[1])
cases = [
    ("", None, other if is_odd else good),
    ("train.start.sampled_rows", fails, milora),
    ("core.calibration.activations.add_to_lower", spoils, milora),
    ("train.run.make_trainer", fails, good),
]
messages = []
for name, act, line in cases:
    try:
        with patch(f"milora_vl.{name}", act) if name and is_odd else nullcontext():
            main(line)
    except Exception as error:
        messages.append(f"{error}")
is_open = dist.is_initialized()
assert main(good) == 0
print("RESULT" + json.dumps([messages, is_open, dist.is_initialized()]))
"""


def test_what_fails_on_one_rank_before_the_first_step_ends_all_with_the_same_error(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Other records, an error while texts are written, NaN, an error after the start. A success closes the group."""
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    first = sorted((other / "images").iterdir())
    shutil.copy(first[0], first[1])
    flags = ["--per_device_train_batch_size", "2", "--max_steps", "1", "--rank", "4"]
    lines = [training(data, tmp_path / "run", *flags, "--method", "lora") for data in (other, tiny_data)]
    lines.append(training(tiny_data, tmp_path / "run", *flags, "--calibration_pictures", "0"))
    for (records, texts, inputs, later), was_open, is_open in results_of_two(ALONE, tmp_path, json.dumps(lines)):
        assert "rank 1 reads other records or pictures than rank 0" in records
        assert texts == "rank 1: RuntimeError: no memory left"
        assert "the inputs of this layer contain NaN" in inputs
        assert later in (texts, "no memory left")
        assert (was_open, is_open) == (True, False)


def test_files_of_an_earlier_run_are_not_overwritten(tiny_data: Path, tmp_path: Path) -> None:
    """A resumed run keeps them, and so does a run that was killed before its first checkpoint and begins again."""
    run = tmp_path / "run"
    assert main(training(tiny_data, run, "--method", "lora", "--rank", "4")) == 0
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"finished": None}))
    (run / "checkpoint-6" / "trainer_state.json").unlink()  # killed while it was written
    break_pictures(tiny_data)
    for resume in ("true", "auto"):
        before = file_contents(run)
        assert "first of the pictures that differ" in fails(
            tiny_data, run, "--resume_from_checkpoint", resume, "--save_steps", "1"
        )
        assert file_contents(run) == before
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = file_contents(run)
    assert "cannot read" in fails(tiny_data, run, "--resume_from_checkpoint", "auto", "--seed", "3")
    assert file_contents(run) == before
