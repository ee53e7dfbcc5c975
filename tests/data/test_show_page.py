"""The HTML page of `show`."""

from __future__ import annotations

import json
from pathlib import Path

from milora_data.__main__ import main
from support.problems import raises_code


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
