"""A model hub on this machine that knows as much as a push needs: who asks, repositories, commits of small files."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class FakeHub:
    """What the hub holds, and what it refuses: paths of requests (a part of them) with the status of the answer."""

    role: str = "write"
    refuses: dict[str, int] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)  # of the last commit of each
    commits: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and content for one request."""
        for part, status in self.refuses.items():
            if part in path:
                return status, {"error": f"this hub refuses {part}"}
        if path.endswith("repos/create"):
            return 200, {"url": f"{self.url}/me/{json.loads(body)['name']}", "id": "x"}
        if path.endswith("validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        if "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.url}/me/run/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"nothing at {path}"}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] == "header":
                self.commits.append(line["value"]["summary"])
            else:
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` at `hub.url` while inside."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.tokens.add(self.headers.get("authorization", "").removeprefix("Bearer "))
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, content = hub.answer(self.path, body)
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            if status >= 400:
                self.send_header("x-error-message", str(content["error"]))
            if status == 404:
                self.send_header("x-error-code", "RepoNotFound")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else answer)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            """Keep the test's output to itself."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
