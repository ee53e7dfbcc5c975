"""The page of answers: everything is in one file, and no answer can break it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from milora_eval.__main__ import main
from support.drawn import encoded
from support.stored_answers import write_answers


def content(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="content" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return dict(json.loads(found.group(1)))


def test_one_page_holds_questions_answers_truths_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_answers(tmp_path, "base", ["red", "no", "x", "</script><script>alert(1)</script>", "مرحبا", ""])
    final = write_answers(tmp_path, "final", ["red", "yes", "green", "no", "blue", "no"])
    (tmp_path / "gqa" / "README.md").write_text("Pictures by us, licence CC BY 4.0.")
    assert main(["view", str(base), str(final)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == final / "view.html"
    found = content(page)
    assert found["runs"] == ["base", "final"]
    assert "6 questions" in page.read_text()
    assert "final corrects 4 wrong answers of base, and gets 1 of its right ones wrong" in page.read_text()
    assert [row["answers"][0]["value"] for row in found["rows"]] == [1, 1, 0, 0, 0, 0]
    assert found["rows"][3]["answers"][0]["text"] == "</script><script>alert(1)</script>"
    assert found["rows"][0]["question"].startswith("What color is it?")
    assert len(found["pictures"]) == 3  # each picture once, for any number of questions
    assert all(source.startswith("data:image/jpeg;base64,") for source in found["pictures"])
    first, *others = (base / "predictions.jsonl").read_text().splitlines(keepends=True)
    other = json.dumps(json.loads(first) | {"question_key": "another question"}) + "\n"
    (base / "predictions.jsonl").write_text("".join([*others, other]))
    assert main(["view", str(base), str(final), "--output", str(tmp_path / "other.html")]) == 0
    paired = [row["answers"][1] for row in content(tmp_path / "other.html")["rows"]]
    assert [answer and answer["text"] for answer in paired] == ["yes", "green", "no", "blue", "no", None]
    text = page.read_text()
    assert "Pictures by us, licence CC BY 4.0." in text
    assert "src=" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in text.replace("http-equiv", "")


def test_a_page_hides_secrets_and_shows_no_picture_that_an_answer_merely_names(tmp_path: Path) -> None:
    """Whoever wrote the answers can name any file, but only knows the content of the pictures that were asked about."""
    folder = write_answers(tmp_path, "base", ["red", "no", "hf_" + "a" * 34, "no", "blue", "no"])
    private = tmp_path / "private.png"
    (tmp_path / "private.png").write_bytes(encoded("red", kind="BMP"))
    lines = list(map(json.loads, (folder / "predictions.jsonl").read_text().splitlines()))
    lines = [line | {"image_file": str(private)} for line in lines]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["view", str(folder)]) == 0
    assert not any(content(folder / "view.html")["pictures"])
    assert "hf_aaaa" not in (folder / "view.html").read_text()
