"""Where a run may start, where it may resume, and that nothing is overwritten."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.checkpoints import is_finished
from milora_vl.train.folder import choose, default_path
from milora_vl.train.recipe import Recipe
from support.checkpoint_files import write_checkpoint


def refused(path: Path, resume: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        choose(path, resume)
    return str(error.value)


def finish(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_model.safetensors").write_bytes(b"")
    (path / "environment.json").write_text(json.dumps({"finished": "2026-01-01"}))


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    finish(tmp_path)
    assert is_finished(tmp_path)
    assert "finished run" in refused(tmp_path)


def test_checkpoints_without_resume_are_not_overwritten(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    text = refused(tmp_path)
    assert "checkpoint-5" in text
    assert "--resume_from_checkpoint true" in text


def test_files_of_somebody_else_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my notes")
    assert "README.md" in refused(tmp_path)


def test_resume_takes_the_last_complete_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    (write_checkpoint(tmp_path, 10) / "trainer_state.json").unlink()
    for word in ("true", "True", "auto"):
        folder = choose(tmp_path, word)
        assert folder.checkpoint == tmp_path / "checkpoint-5"
        assert [path.name for path, _ in folder.incomplete] == ["checkpoint-10"]
    assert choose(tmp_path / "other", str(tmp_path / "checkpoint-5")).checkpoint == tmp_path / "checkpoint-5"


def test_a_checkpoint_from_elsewhere_does_not_overwrite_a_finished_run(tmp_path: Path) -> None:
    checkpoint, run = write_checkpoint(tmp_path / "other", 5), tmp_path / "run"
    finish(run)
    assert "finished run" in refused(run, str(checkpoint))
    own = write_checkpoint(run, 5)
    assert choose(run, str(own)).checkpoint == own


def test_resume_without_anything_to_resume(tmp_path: Path) -> None:
    assert "nothing to resume" in refused(tmp_path, "true")
    assert "no such folder" in refused(tmp_path, str(tmp_path / "checkpoint-9"))
    broken = write_checkpoint(tmp_path, 3)
    (broken / "trainer_state.json").unlink()
    assert "cannot resume from" in refused(tmp_path, str(broken))
    assert choose(tmp_path, "auto").checkpoint is None


def test_auto_starts_again_what_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"finished": None}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut off")
    assert choose(tmp_path, "auto").checkpoint is None
    (tmp_path / "environment.json").unlink()
    assert "trained weights" in refused(tmp_path, "auto")


def test_the_default_folder_names_model_method_and_time() -> None:
    recipe = Recipe.parse({"model": "org/m", "policy": [{"modules": "language", "method": "lora", "rank": 8}]})
    path = default_path(recipe, datetime(2026, 11, 25, 4, 36, 7))
    assert path == Path("runs/m/lora-r8/2026-11-25_043607")
