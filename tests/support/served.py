"""Start a server with OpenAI's protocol on this machine, and ask it."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def serving(command: Sequence[str | Path], seconds: int = 180, **environment: str) -> Iterator[str]:
    """Start `command` with --port; yield the address of chat completions when the server answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*map(str, command), "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(seconds):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the server has stopped"
            time.sleep(1)
        yield f"http://localhost:{port}/v1/chat/completions"
    finally:
        server.terminate()
        server.wait(30)


def ask(address: str, model: str | Path, question: str, picture: Path | None = None, max_tokens: int = 8) -> str:
    """Return the greedy answer to a question, about a picture if there is one."""
    content: Any = question
    if picture is not None:
        url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    body = {"model": str(model), "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"]).strip()
