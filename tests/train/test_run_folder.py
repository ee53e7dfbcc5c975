"""The folder of a run: where one may start and resume, its lock, and that nothing is overwritten."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from milora_eval.__main__ import main as evaluate
from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.analyze import __main__ as analyze
from milora_vl.chat import __main__ as chat
from milora_vl.common import atomic_write
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import is_finished, projector_file
from milora_vl.export import __main__ as export
from milora_vl.forgetting import job
from milora_vl.forgetting.__main__ import main as forget
from milora_vl.models.projector import save_projector
from milora_vl.train.__main__ import main
from milora_vl.train.plan import default_folder
from milora_vl.train.resume import choose_folder
from milora_vl.train.settings import Recipe
from support.adapter_cases import move
from support.checkpoint_files import write_checkpoint
from support.problems import raises_code
from support.train_runs import file_contents, losses, training


def refused(path: Path, resume: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        choose_folder(path, resume)
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
        folder = choose_folder(tmp_path, word)
        assert folder.checkpoint == tmp_path / "checkpoint-5"
        assert [path.name for path, _ in folder.incomplete] == ["checkpoint-10"]
    assert choose_folder(tmp_path / "other", str(tmp_path / "checkpoint-5")).checkpoint == tmp_path / "checkpoint-5"


def test_a_checkpoint_from_elsewhere_does_not_overwrite_a_finished_run(tmp_path: Path) -> None:
    checkpoint, run = write_checkpoint(tmp_path / "other", 5), tmp_path / "run"
    finish(run)
    assert "finished run" in refused(run, str(checkpoint))
    own = write_checkpoint(run, 5)
    assert choose_folder(run, str(own)).checkpoint == own


def test_resume_without_anything_to_resume(tmp_path: Path) -> None:
    assert "nothing to resume" in refused(tmp_path, "true")
    assert "no such folder" in refused(tmp_path, str(tmp_path / "checkpoint-9"))
    broken = write_checkpoint(tmp_path, 3)
    (broken / "trainer_state.json").unlink()
    assert "cannot resume from" in refused(tmp_path, str(broken))
    assert choose_folder(tmp_path, "auto").checkpoint is None


def test_auto_starts_again_what_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"finished": None}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut off")
    assert choose_folder(tmp_path, "auto").checkpoint is None
    (tmp_path / "environment.json").unlink()
    assert "trained weights" in refused(tmp_path, "auto")


def test_the_default_folder_names_model_method_and_time() -> None:
    recipe = Recipe.parse({"model": "org/m", "policy": [{"modules": "language", "method": "lora", "rank": 8}]})
    path = default_folder(recipe, datetime(2026, 11, 25, 4, 36, 7))
    assert path == Path("runs/m/lora-r8/2026-11-25_043607")


HOLDER = """
import sys, time
from pathlib import Path
from milora_vl.common.atomic_write import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_training_in_the_folder_is_refused_and_changes_nothing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_write, "WAIT", 0)
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


CHAT, FORGETTING = "python -m milora_vl.chat", "python -m milora_vl.forgetting"

Command = Callable[[list[str]], int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was killed while it wrote checkpoint-11."""
    monkeypatch.chdir(tmp_path)
    folder = Path("run")
    model = apply_milora(load_model("tiny")[0], "[{modules: language, method: milora, protect: 0, rank: 2}]")
    for step in (9, 10):
        move(model)
        save_adapter(model, folder / f"checkpoint-{step}")
    (folder / "checkpoint-11").mkdir()
    (folder / "recipe.yaml").write_text("model: tiny\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("command", "words", "offered"),
    [
        (chat.main, "--model tiny --adapter run hi", f"{CHAT} --model tiny --adapter run/checkpoint-10"),
        (chat.main, "--model run hi", "--model run/checkpoint-10"),
        (chat.main, "--model run --compare hi", "--model run/checkpoint-10"),
        (export.main, "run --to merged", "python -m milora_vl.export --to FORM run/checkpoint-10"),
        (forget, "--model tiny --adapter run", f"{FORGETTING} --model tiny --adapter run/checkpoint-10"),
        (forget, "--model run", f"{FORGETTING} --model run/checkpoint-10"),
        (analyze.main, "run", "python -m milora_vl.analyze run/checkpoint-10"),
        (
            evaluate,
            "run --model tiny --adapter run --benchmarks x.json --output_dir out",
            "python -m milora_eval run --model tiny --adapter run/checkpoint-10",
        ),
    ],
)  # fmt: skip
def test_commands_name_the_newest_checkpoint(run: Path, command: Command, words: str, offered: str) -> None:
    with pytest.raises(UserError) as error:
        command(shlex.split(words))
    assert "step 10" in str(error.value)
    assert f"use it:    {offered}\n" in str(error.value)
    assert len(str(error.value).splitlines()) == 4
    assert {path.name for path in run.parent.iterdir()} == {"run"}


def test_the_checkpoint_works_in_its_place(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(run / "checkpoint-10")
    assert chat.main(["--model", "tiny", "--adapter", checkpoint, "--max_new_tokens", "2", "hi"]) == 0
    assert chat.main(["--model", checkpoint, "--compare", "--max_new_tokens", "2", "hi"]) == 0
    assert forget(["--model", "tiny", "--adapter", checkpoint, "--on", "text", "--num_tokens", "64"]) == 0
    assert (run / "checkpoint-10" / job.FILE).is_file()
    assert export.main([checkpoint, "--to", "rank-2"]) == 0


def test_a_projector_is_looked_for_in_the_checkpoints_of_its_run(run: Path) -> None:
    with raises_code("", where="run", message="no projector weights") as error:
        projector_file(run)
    assert "checkpoint" not in str(error.value)
    save_projector(load_model("tiny")[0], run / "checkpoint-11")
    with raises_code("", hint="use it:    --projector_weights run/checkpoint-11"):
        projector_file(run)
