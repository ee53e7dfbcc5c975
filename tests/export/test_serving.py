"""transformers' own server with a merged model gives the answers of `milora_vl.chat`."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from milora_vl import load_model
from milora_vl.chat import main as chat
from milora_vl.export import export
from milora_vl.train.command import main as train

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")
pytest.importorskip("uvicorn", reason="pip install 'transformers[serving]'")


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder; yield the address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(180):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the server has stopped"
            time.sleep(1)
        yield f"http://localhost:{port}/v1/chat/completions"
    finally:
        server.terminate()
        server.wait(30)


def ask(address: str, model: Path, picture: Path) -> str:
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What colour is it?"}]
    messages = [{"role": "user", "content": parts}]
    body = {"model": str(model), "messages": messages, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"]).strip()


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
    with serving(tmp_path / "merged") as address:
        assert ask(address, tmp_path / "merged", picture) == said
