"""The page of answers: everything in one file, nothing that an answer holds can break it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import official_data
import pytest

from milora_data.errors import UserError
from milora_eval.__main__ import main
from milora_eval.answers.lines import to_line
from milora_eval.answers.store import Store
from milora_eval.scores.results import numbers, write_results
from milora_eval.suites import find_benchmark


def stored(folder: Path, name: str, texts: list[str]) -> Path:
    benchmark = find_benchmark("gqa")
    official_data.gqa(official_data.made(folder / "gqa"))
    items = benchmark.load(folder / "gqa")
    out = folder / "run" / "eval" / "gqa" / name
    lines = [to_line(benchmark, item, text, item.id, folder) for item, text in zip(items, texts, strict=True)]
    Store(out).finish(lines)
    write_results(out, {"suite": "gqa", "which": name} | numbers(out, "gqa"))
    return out


def content(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="content" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return dict(json.loads(found.group(1)))


def test_one_page_holds_questions_answers_truths_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = stored(tmp_path, "base", ["red", "no", "x", "</script><script>alert(1)</script>", "مرحبا", ""])
    final = stored(tmp_path, "final", ["red", "yes", "green", "no", "blue", "no"])
    (tmp_path / "gqa" / "README.md").write_text("Pictures by us, licence CC BY 4.0.")
    assert main(["view", str(base), str(final)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == final / "view.html"
    found = content(page)
    assert found["runs"] == ["base", "final"]
    assert "6 questions" in page.read_text()
    assert "final is right on 4 questions that base gets wrong, and wrong on 1 of its right ones" in page.read_text()
    assert [row["answers"][0]["value"] for row in found["rows"]] == [1, 1, 0, 0, 0, 0]
    assert found["rows"][3]["answers"][0]["text"] == "</script><script>alert(1)</script>"
    assert found["rows"][0]["question"].startswith("What color is it?")
    assert len(found["pictures"]) == 3  # each once, however many questions it has
    assert all(source.startswith("data:image/jpeg;base64,") for source in found["pictures"])
    text = page.read_text()
    assert "Pictures by us, licence CC BY 4.0." in text
    assert "src=" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in text.replace("http-equiv", "")


def test_a_limit_and_a_lost_picture(tmp_path: Path) -> None:
    base = stored(tmp_path, "base", ["red"] * 6)
    (tmp_path / "gqa" / "images" / "n0.jpg").unlink()
    page = tmp_path / "page.html"
    assert main(["view", str(base), "--output", str(page), "--limit", "2"]) == 0
    assert len(content(page)["rows"]) == 2
    assert "2 of 6 questions" in page.read_text()
    with pytest.raises(UserError, match="exists already"):
        main(["view", str(base), "--output", str(page)])
    assert main(["view", str(base), "--output", str(tmp_path / "all.html")]) == 0
    assert content(tmp_path / "all.html")["pictures"].count("") == 1
