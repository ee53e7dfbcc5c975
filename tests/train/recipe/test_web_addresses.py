"""A web address in the place of a file or folder is refused, unchanged and with what to do; nothing is fetched."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from milora_data.__main__ import main as data
from milora_eval.__main__ import main as evaluate
from milora_vl.chat import __main__ as chat
from milora_vl.common.cli.web import url_problem
from milora_vl.export import __main__ as export
from milora_vl.forgetting.__main__ import main as forget
from milora_vl.train import __main__ as train
from support.problems import raises_code

PICTURE, DATA, FOLDER = (f"https://example.org/a/{name}" for name in ("cat.png", "data.json", "pictures"))
Command = Callable[[list[str]], int]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (chat.main, f"--model tiny --image {PICTURE} hi"),
        (chat.main, f"--model tiny --adapter {FOLDER} hi"),
        (export.main, f"{FOLDER} --to merged"),
        (forget, f"--model tiny --adapter . --on pictures --data_path {DATA}"),
        (evaluate, f"run --model tiny --benchmarks {DATA} --output_dir out"),
        (data, f"check {DATA}"),
        (train.main, f"--model tiny --rank 2 --use_cpu --data_path {DATA} --output_dir out"),
        (train.main, f"--model tiny --rank 2 --use_cpu --data_path x.json --image_folder {FOLDER} --output_dir out"),
    ],
)  # fmt: skip
def test_commands_refuse_it(command: Command, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    record = {"id": "a", "image": "a.png", "conversations": turns}
    (tmp_path / "x.json").write_text(json.dumps([record]), encoding="utf-8")
    with raises_code("", message="is a web address; only files on this machine are read") as error:
        command(shlex.split(words))
    (address,) = [word for word in shlex.split(words) if word.startswith("https")]
    assert str(url_problem(address)) in str(error.value)
    assert not (tmp_path / "out").exists()
