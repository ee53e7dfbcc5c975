"""Pictures at web addresses: refused unless asked for, then downloaded once, within limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from milora_data.pictures import download
from milora_data.pictures.files import ImageError, WebPicture, load_image
from milora_vl.common.errors import DataError
from milora_vl.train.command import main as train
from support.drawn import dump_lines, encoded
from support.problems import raises_code
from support.train_runs import losses, training


class Pictures(BaseHTTPRequestHandler):
    """Serves red.png, and answers that must not become pictures."""

    asked: list[str]

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        type(self).asked.append(name)
        moved = {"/moved.png": "/red.png", "/file.png": "file:///etc/passwd"}
        if name in moved:
            self.send_response(302)
            self.send_header("Location", moved[name])
            self.end_headers()
            return
        self.send_response(404 if name == "/gone.png" else 200)
        self.end_headers()
        if name == "/large.png":
            self.wfile.write(b"x" * 5000)
        elif name == "/slow.png":
            for _ in range(20):
                time.sleep(0.05)
                self.wfile.write(b"x")
        elif name == "/page.png":
            self.wfile.write(b"<html>no picture</html>")
        elif name == "/red.png":
            self.wfile.write(encoded("red"))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    Pictures.asked = []
    made = HTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    made.shutdown()
    made.server_close()


def asked(picture: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": "What colour?"}, {"type": "image_url", "image_url": {"url": picture}}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]}


def words(data: Path, *more: str) -> list[str]:
    return ["--rank", "4", "--max_steps", "2", "--data_path", str(data), "--image_folder", str(data.parent), *more]


@pytest.mark.parametrize("how", [[], ["--streaming", "True"]], ids=["plain", "stream"])
def test_they_are_refused_unless_asked_for_and_downloaded_once(how: list[str], server: str, tmp_path: Path) -> None:
    if how:
        pytest.importorskip("torchdata")
    data = tmp_path / "data.jsonl"
    dump_lines(data, [asked(f"{server}/red.png?token=secret"), asked(f"{server}/moved.png")] * 2)
    with raises_code("data-missing-pictures", hint="--web_pictures download", kind=DataError) as error:
        train(training(tmp_path, tmp_path / "refused", *words(data, *how)))
    assert "secret" not in str(error.value)
    assert Pictures.asked == []
    for name in ("first", "second"):
        assert train(training(tmp_path, tmp_path / name, *words(data, *how, "--web_pictures", "download"))) == 0
        assert sorted(Pictures.asked) == ["/moved.png", "/red.png", "/red.png"]
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert len(list((tmp_path / "cache" / "pictures").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.png", "404"),
        ("large.png", "more than 0 MB"),
        ("slow.png", "more than 0.3 seconds"),
        ("empty.png", "the download is empty"),
        ("page.png", "not a picture"),
        ("file.png", "'file:///etc/passwd' is not allowed"),
    ],
)
def test_what_is_no_picture_is_an_error_of_that_picture(
    name: str, reason: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MOST_BYTES", 4000)
    monkeypatch.setattr(download, "MOST_SECONDS", 0.3)
    with raises_code("image-unreadable", says=reason, kind=ImageError) as error:
        load_image(WebPicture(f"{server}/{name}?token=secret"))
    assert error.value.first.code == "image-unreadable"
    assert error.value.first.where == f"{server}/{name}"
