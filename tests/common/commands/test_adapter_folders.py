"""All commands that take an adapter say the same about a path without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from milora_eval.answers.target import eval_target
from milora_vl.chat import __main__ as chat
from milora_vl.core.adapter.folders import base_of
from milora_vl.export import __main__ as export
from milora_vl.forgetting import __main__ as forgetting
from support.problems import raises_code

COMMANDS: dict[str, Callable[[Path], object]] = {
    "chat": lambda path: chat.main(["--model", "tiny", "--adapter", str(path), "What?"]),
    "eval": lambda path: eval_target("tiny", path, None),
    "forgetting": lambda path: forgetting.main(["--model", "tiny", "--adapter", str(path)]),
    "export": lambda path: export.main([str(path), "--to", "merged", "--output_dir", "merged"]),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder that looks like an adapter."""
    folder = tmp_path / "run1"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "tiny"}))
    (folder / "adapter_model.safetensors").touch()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_the_same_about_a_missing_adapter(command: str, adapter: Path) -> None:
    where = str(adapter.parent / "run9") if command == "export" else "--adapter"
    with raises_code("adapter-no-folder", where, "no such adapter folder", f"adapters there: {adapter}"):
        COMMANDS[command](adapter.parent / "run9")
    with raises_code("adapter-no-folder", "", "this is a file", f"adapters there: {adapter}"):
        COMMANDS[command](adapter / "adapter_model.safetensors")
    (adapter.parent / "empty").mkdir()
    with raises_code("adapter-missing", "", "no adapter in this folder", "found nothing; expected a folder with"):
        COMMANDS[command](adapter.parent / "empty")


def test_a_relative_base_is_found_from_every_folder(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training ran in a folder above the adapter; a base in the present folder comes first, a hub id stays."""
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/base"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base_of(adapter) == "models/base"
    for folder in (tmp_path, Path()):
        (folder / "models" / "base").mkdir(parents=True)
        (folder / "models" / "base" / "config.json").touch()
        assert Path(base_of(adapter)).samefile(folder / "models" / "base")
    assert base_of(adapter) == "models/base"
