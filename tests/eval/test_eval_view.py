"""The page of answers: everything is in one file, and no answer can break it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from milora_eval.__main__ import main
from support.drawn import encoded
from support.stored_answers import write_answers


def cards(page: Path) -> list[str]:
    return page.read_text().split("<li data-kinds=")[1:]


def test_one_page_holds_questions_answers_truths_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_answers(tmp_path, "base", ["red", "no", "x", "</script><script>alert(1)</script>", "مرحبا", ""])
    final = write_answers(tmp_path, "final", ["red", "yes", "green", "no", "blue", "no"])
    (tmp_path / "gqa" / "README.md").write_text("Pictures by us, licence CC BY 4.0.")
    assert main(["view", str(base), str(final)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == final / "view.html"
    found, text = cards(page), page.read_text()
    assert "6 questions" in text
    assert "final corrects 4 wrong answers of base, and gets 1 of its right ones wrong" in text
    assert [card.split('"')[1] for card in found][:3] == ["right", "wrong|changed|now wrong", "right|changed|now right"]
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in found[3]
    assert "What color is it?" in found[0]
    assert all(card.count('src="data:image/jpeg;base64,') == 1 for card in found)
    first, *others = (base / "predictions.jsonl").read_text().splitlines(keepends=True)
    other = json.dumps(json.loads(first) | {"question_key": "another question"}) + "\n"
    (base / "predictions.jsonl").write_text("".join([*others, other]))
    assert main(["view", str(base), str(final), "--output", str(tmp_path / "other.html")]) == 0
    of_final = [re.findall(r"<dt>final</dt><dd[^>]*>(\w+)", card) for card in cards(tmp_path / "other.html")]
    assert of_final == [["yes"], ["green"], ["no"], ["blue"], ["no"], []]
    assert "Pictures by us, licence CC BY 4.0." in text
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
    assert "data:image" not in (folder / "view.html").read_text()
    assert "hf_aaaa" not in (folder / "view.html").read_text()
