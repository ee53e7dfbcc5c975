"""A run that was interrupted holds checkpoints alone: every command names the newest one, which works in its place."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from milora_eval.__main__ import main as evaluate
from milora_vl import apply_milora, chat, export, forgetting, load_model, save_adapter
from milora_vl.analyze import __main__ as analyze
from milora_vl.common.errors import UserError
from milora_vl.forgetting.__main__ import main as forget
from milora_vl.models.projector import projector_file, save_projector
from support.adapter_cases import move
from support.problems import raises_code

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
    assert (run / "checkpoint-10" / forgetting.job.FILE).is_file()
    assert export.main([checkpoint, "--to", "rank-2"]) == 0


def test_a_projector_is_looked_for_in_the_checkpoints_of_its_run(run: Path) -> None:
    with raises_code("", where="run", message="no projector weights") as error:
        projector_file(run)
    assert "checkpoint" not in str(error.value)
    save_projector(load_model("tiny")[0], run / "checkpoint-11")
    with raises_code("", hint="use it:    --projector_weights run/checkpoint-11"):
        projector_file(run)
