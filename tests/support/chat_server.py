"""A server with OpenAI's interface and no model: its answers depend on the questions alone. It fails on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
WORDS = ("red", "green", "blue", "white", "Yes", "No", "A", "B")


@dataclass
class Answers:
    """What a server does, and what it was asked.

    `faults` are what happens to each question before it is answered: a status, or None, which drops the connection. The
    server `dies` after so many answers.
    """

    models: Sequence[str] = ("mine",)
    faults: Sequence[int | None] = ()
    dies: int | None = None
    refuses: str = ""  # a text of the questions that get an error 400
    wrong: str = ""  # a text in place of every answer
    asked: list[tuple[str, Body]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.lock, self.now, self.done, self.tries = threading.Lock(), 0, 0, Counter[str]()


def answer(body: Body) -> tuple[str, str]:
    """Return text and reason of the end: one in eight questions is cut off."""
    seen = body["model"], body.get("messages"), body.get("prompt")
    number = hashlib.sha256(json.dumps(seen).encode()).digest()[0]
    return WORDS[number % len(WORDS)], "length" if number // len(WORDS) % 8 == 0 else "stop"


class _Handler(BaseHTTPRequestHandler):
    answers: Answers

    def do_GET(self) -> None:
        is_list = self.path == "/v1/models"
        self._send(
            200 if is_list else 404,
            {"data": [{"id": name, "created": 1} for name in self.answers.models]},
        )

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        body, served = json.loads(content), self.answers
        with served.lock:
            served.asked.append((self.path, body))
            served.headers.append(dict(self.headers))
            served.now += 1
            served.most_at_once = max(served.now, served.most_at_once)
            tries = served.tries[content.decode()]
            served.tries[content.decode()] += 1
            is_dead = served.dies is not None and served.done >= served.dies
            fault = None if is_dead else served.faults[tries] if tries < len(served.faults) else 200
            served.done += fault == 200
        time.sleep(0.02)  # so that questions overlap
        with served.lock:
            served.now -= 1
        if is_dead:
            self.server.shutdown()
            self.server.socket.close()
        if fault is None:
            self.close_connection = True
        elif served.refuses and served.refuses in content.decode():
            self._send(400, {"error": {"message": f"too long for {self.headers['Authorization']}"}})
        elif fault != 200:
            self._send(fault, {"detail": "busy"})
        else:
            text, reason = answer(body)
            said = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": f" {text}\n"}}
            self._send(200, {"choices": [{**said, "finish_reason": reason}]})

    def _send(self, status: int, value: Any) -> None:
        content = (self.answers.wrong or json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def answering(answers: Answers) -> Iterator[str]:
    """Start a server; yield its address."""
    handler = type("Handler", (_Handler,), {"answers": answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/v1"
        finally:
            running.shutdown()
