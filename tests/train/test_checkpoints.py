"""A checkpoint that was cut off by a kill is recognised, whatever file it was cut in."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_vl.adapter.checkpoints import checkpoints, latest, resume_hint, set_aside, why_incomplete
from support.checkpoint_files import write_checkpoint


def test_the_last_complete_one_is_found(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, step)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    assert latest(tmp_path) == (tmp_path / "checkpoint-100", [])
    (tmp_path / "checkpoint-100" / "trainer_state.json").unlink()
    found, skipped = latest(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert [folder.name for folder, _ in skipped] == ["checkpoint-100"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_file_that_is_cut_off_makes_it_incomplete(tmp_path: Path, name: str, kept: float) -> None:
    folder = write_checkpoint(tmp_path, 3)
    assert why_incomplete(folder) is None
    file = folder / name
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    assert name in str(why_incomplete(folder))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rng_state.pth", "trainer_state.json"])
def test_a_file_that_is_missing_makes_it_incomplete(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, 3)
    (folder / name).unlink()
    assert why_incomplete(folder)


def test_set_aside_keeps_the_files_and_leaves_the_list(tmp_path: Path) -> None:
    moved = set_aside(write_checkpoint(tmp_path, 3))
    assert (moved / "optimizer.pt").is_file()
    assert checkpoints(tmp_path) == []
    assert set_aside(write_checkpoint(tmp_path, 3)) != moved


def test_what_a_stopped_run_goes_on_from_is_told(tmp_path: Path) -> None:
    assert resume_hint(tmp_path).startswith("there is no checkpoint yet")
    write_checkpoint(tmp_path, 5)
    (write_checkpoint(tmp_path, 10) / "trainer_state.json").unlink()  # Ctrl-C in the middle of it
    assert resume_hint(tmp_path).endswith("continues from step 5")
