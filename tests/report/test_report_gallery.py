from __future__ import annotations

from collections import Counter
from pathlib import Path

from milora_vl.report.parts import Answer, Question, outcomes, questions, sample
from milora_vl.report.run_page import read_run
from support.fake_run import make_run


def made(
    number: int, kind: str = "naming", before: float = 0, after: float = 1, picture: int | None = None
) -> Question:
    path = Path(f"{number if picture is None else picture}.png")
    return Question(f"q{number}", kind, "What?", "", ("a",), path, Answer("b", before), Answer("a", after))


def test_the_sample_has_the_shares_of_the_whole() -> None:
    items = [made(i, "naming" if i % 4 else "colour", after=float(i % 3 == 0)) for i in range(240)]
    chosen = sample(items, 24)
    assert Counter(item.kind for item in chosen) == {"naming": 18, "colour": 6}
    assert sum(item.after.is_right for item in chosen if item.after) == 8


def test_the_sample_is_the_same_in_any_order_and_never_repeats_a_question() -> None:
    items = [made(i, after=float(i % 2)) for i in range(50)]
    assert sample(items, 24) == sample(items[::-1], 24)
    assert len({item.key for item in sample(items, 24)}) == 24
    assert len(sample(items, 99)) == 50
    assert sample([], 24) == []


def test_outcomes_are_counted_in_pairs() -> None:
    items = [
        made(1, before=0, after=1),
        made(2, before=1, after=1),
        made(3, before=1, after=0),
        made(4, before=0, after=0.4),
    ]
    assert list(outcomes(items).values()) == [1, 1, 1, 1]
    unpaired = Question("q", "naming", "What?", "", (), None, None, Answer("a", 1))
    assert outcomes([*items, unpaired]) == {}


def test_answers_of_both_models_meet_at_their_question(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_questions=16)
    file = run / "eval/emoji/base/predictions.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True)[:-1])))
    items = questions(read_run(run).comparisons[0])
    assert [item.key for item in items] == [f"emoji/q{i}" for i in range(16)]
    assert [item.key for item in items if item.before is None] == ["emoji/q15"]


def test_verdicts_in_words() -> None:
    assert [Answer("x", value).verdict for value in (0.0, 0.6, 1.0)] == ["wrong", "60% right", "right"]


def test_the_mark_of_the_picture_is_not_shown_and_earlier_turns_are(tmp_path: Path) -> None:
    items = questions(read_run(make_run(tmp_path / "run", num_questions=8)).comparisons[0])
    assert not [item for item in items if "<image>" in item.text + item.context]
    assert [item.context for item in items if item.kind == "multi turn"] == ["What is this?\na thing"]
