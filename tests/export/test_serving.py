"""transformers' own server with a merged model gives the answers of `milora_vl.chat`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from milora_vl import load_model
from milora_vl.chat import main as chat
from milora_vl.export import export
from milora_vl.train.command import main as train
from support.served import ask, serving

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")
pytest.importorskip("uvicorn", reason="pip install 'transformers[serving]'")


def test_the_server_of_transformers_answers_as_chat_does(tiny_data: Path, tmp_path: Path, capsys) -> None:
    for part in load_model("tiny"):
        part.save_pretrained(tmp_path / "base")
    data = ["--data_path", str(tiny_data / "train.json"), "--image_folder", str(tiny_data / "images")]
    sizes = ["--rank", "4", "--max_steps", "8", "--learning_rate", "0.01"]
    train(["--model", str(tmp_path / "base"), *data, *sizes, "--output_dir", str(tmp_path / "run")])
    export(tmp_path / "run", "merged", tmp_path / "merged")
    picture = tiny_data / "images" / "0.png"
    capsys.readouterr()
    asked = ["--image", str(picture), "--max_new_tokens", "8", "What colour is it?"]
    chat(["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "run"), *asked])
    said = capsys.readouterr().out.strip()
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "merged", "--device", "cpu"]
    with serving(command) as address:
        assert ask(address, tmp_path / "merged", "What colour is it?", picture) == said
