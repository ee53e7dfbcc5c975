"""The commands of milora_data: show, convert, their help and their mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data.__main__ import main
from milora_vl.common.errors import DataError
from support.problems import raises_code

Out = pytest.CaptureFixture[str]


def test_show_marks_what_is_learnt(tiny_data: Path, capsys: Out) -> None:
    assert main(["show", str(tiny_data / "train.json"), "--image_folder", str(tiny_data / "images")]) == 0
    out = capsys.readouterr().out
    width, height = Image.open(tiny_data / "images" / "0.png").size
    assert f"picture: 0.png ({width} x {height})" in out
    assert (
        "USER: <image>\nWhat colour is it? ASSISTANT:[[ red</s>]]USER: Are you sure? ASSISTANT:[[ Yes, it is.</s>]]"
        in out
    )


def test_show_finds_records_and_says_when_there_is_none(tiny_data: Path, capsys: Out) -> None:
    data = str(tiny_data / "train.json")
    assert main(["show", data, "--id", "t2"]) == 0
    assert "What is 2 + 1?" in capsys.readouterr().out
    assert main(["show", data, "--index", "10", "--limit", "5"]) == 0
    assert capsys.readouterr().out.count("ASSISTANT:[[") == 2
    with raises_code("", message="no record with id"):
        main(["show", data, "--id", "none"])


def test_the_page_holds_pictures_and_marks_what_is_learnt(tiny_data: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nIs 1 < 2 & 3?"}, {"from": "gpt", "value": "<b>Yes</b>"}]
    records = [
        {"id": "a", "image": "0.png", "conversations": turns},
        {"id": "b", "image": "no.png", "conversations": turns},
    ]
    (tiny_data / "two.json").write_text(json.dumps(records))
    (tiny_data / "README.md").write_text("# Data\n\n- Pictures by <me>, licence CC BY 4.0.\nMore.\n")
    out = tmp_path / "new" / "page.html"
    arguments = ["show", str(tiny_data / "two.json"), "--image_folder", str(tiny_data / "images"), "--limit", "9"]
    assert main([*arguments, "--html", str(out)]) == 0
    page = out.read_text()
    assert page.count("<article ") == 2
    assert page.count("data:image/jpeg;base64,") == 1
    assert "no.png (no such file)" in page
    assert "Is 1 &lt; 2 &amp; 3?" in page
    assert "<mark> &lt;b&gt;Yes&lt;/b&gt;&lt;/s&gt;</mark>" in page
    assert "<p>Pictures by &lt;me&gt;, licence CC BY 4.0.</p>" in page
    assert "http" not in page.replace("http-equiv", "")
    with raises_code("output-exists"):
        main([*arguments, "--html", str(out)])


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "record-image-count"),
    ],
)
def test_messages_that_cannot_be_used_are_named_and_left_out(
    tmp_path: Path, value: dict[str, Any], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, path = json.dumps({"messages": said("a", "b")}), json.dumps(value), tmp_path / "m.jsonl"
    words = ["convert", "--from", "messages", str(path), "--output_dir", str(tmp_path / "out"), "--format", "json"]
    path.write_text(f"{bad}\n{bad}")
    with raises_code(code, where=f"{path}:1", kind=DataError):
        main(words)
    assert not (tmp_path / "out" / "data.json").exists()
    path.write_text(f"{good}\n{bad}\n{{\n{good}")
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"file": str(tmp_path / "out" / "data.json"), "records": 2, "left_out": 2}
    assert [line.split(": ")[1] for line in err.splitlines() if "left out" in line] == [f"{path}:2", f"{path}:3"]
