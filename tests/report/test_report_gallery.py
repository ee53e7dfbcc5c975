from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from milora_vl.report.page import Asked, questions, sample, write_report
from milora_vl.report.read_run import read_run
from support.fake_run import make_run


def made(number: int, kind: str = "naming", before: float | None = 0, after: float | None = 1) -> Asked:
    def line(correct: float | None) -> dict[str, Any]:
        return {"question_key": f"q{number}", "type": kind, "correct": correct}

    return line(before), line(after)


def test_the_sample_has_the_shares_of_the_whole() -> None:
    items = [made(i, "naming" if i % 4 else "colour", after=float(i % 3 == 0)) for i in range(240)]
    chosen = [after for _, after in sample(items, 24) if after]
    assert Counter(line["type"] for line in chosen) == {"naming": 18, "colour": 6}
    assert sum(line["correct"] for line in chosen) == 8


def test_the_sample_is_the_same_in_any_order_and_never_repeats_a_question() -> None:
    items = [made(i, after=float(i % 2)) for i in range(50)]
    assert sample(items, 24) == sample(items[::-1], 24)
    assert len({after["question_key"] for _, after in sample(items, 24) if after}) == 24
    assert len(sample(items, 99)) == 50
    assert sample([], 24) == []


def test_answers_of_both_models_meet_at_their_question(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_questions=16)
    file = run / "eval/emoji/base/predictions.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True)[:-1])))
    items = questions(read_run(run).comparisons[0])
    assert [after["id"] for _, after in items if after] == [f"q{i}" for i in range(16)]
    assert [after["id"] for before, after in items if after and before is None] == ["q15"]


def test_a_card_shows_earlier_turns_and_a_score_between_right_and_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_questions=8)
    file = run / "eval/emoji/final/predictions.jsonl"
    file.write_text(re.sub(r'"correct": [01].0', '"correct": 0.6', file.read_text()))
    text = write_report(run).read_text(encoding="utf-8")
    assert "&lt;image&gt;" not in text
    assert "What is this?\na thing" in text
    assert text.count("✓ 60% right") == 8
