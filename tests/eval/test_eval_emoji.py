"""The emoji questions: prompts, accepted answers, and baselines that ignore the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milora_eval.benchmark import Answer, MissingData
from milora_eval.benchmarks.emoji import EmojiBenchmark
from support.eval_questions import record, write_questions
from support.problems import raises_code


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "emoji")


def test_the_last_question_is_asked_with_all_turns_before_it(data: Path) -> None:
    items = {item.id: item for item in EmojiBenchmark().load(data)}
    turns = EmojiBenchmark().prompt(items["multi_turn-red"])
    assert [(turn.role, turn.text) for turn in turns] == [
        ("user", "<image>\nWhat kind?"),
        ("assistant", "square"),
        ("user", "And its color?"),
    ]
    assert items["multi_turn-red"].images == (str(data / "images" / "red.png"),)
    assert items["text_only-red"].images == ()


def test_any_accepted_answer_counts(data: Path) -> None:
    benchmark = EmojiBenchmark()
    item = next(item for item in benchmark.load(data) if item.id == "choice-red")
    assert [benchmark.score(item, text) for text in ("Red.", "a red", "the red", "blue", "red fox")] == [1, 1, 1, 0, 0]


def test_the_baseline_is_the_most_frequent_answer_of_the_test_itself(data: Path) -> None:
    """The baseline is stricter than the most frequent training answer: no constant answer scores higher."""
    metrics = {metric.name: metric for metric in all_answered(data, "red")}
    assert metrics["colour"].baseline == 1 / 4  # four colours, once each
    assert metrics["yes_no"].baseline == 3 / 4  # always yes
    assert {name for name, metric in metrics.items() if metric.baseline is None} == {"mean, answer in first line"}


def test_the_baseline_knows_the_form_of_the_answer(tmp_path: Path) -> None:
    """The baseline of a type with yes/no and open questions answers yes to the former and red to the latter."""
    words = ["Yes", "Yes", "No", "red", "red", "red", "blue"]
    records = [record("text_only", f"t{i}", "?", [word], image=None) for i, word in enumerate(words)]
    (tmp_path / "test.json").write_text(json.dumps(records))
    (metric,) = (m for m in all_answered(tmp_path, "red") if m.name == "text_only")
    assert metric.baseline == pytest.approx((2 + 3) / 7)


def test_where_options_are_offered_the_baseline_is_the_best_fixed_position(data: Path) -> None:
    metrics = {metric.name: metric for metric in all_answered(data, "red")}
    assert metrics["choice"].baseline == 1  # the first one is right everywhere here
    assert metrics["choice_letter"].baseline == 1


def test_the_headline_is_the_mean_over_types(data: Path) -> None:
    metrics = all_answered(data, "red")
    own = {metric.name: metric.value for metric in metrics[1:-1]}
    assert metrics[0].name == "mean over types"
    assert metrics[0].value == pytest.approx(sum(own.values()) / len(own))
    assert own == {"colour": 0.25, "yes_no": 0, "choice": 0.25, "choice_letter": 0, "multi_turn": 0.25, "text_only": 0}
    assert metrics[0].stderr is not None


def test_an_answer_in_a_sentence_counts_in_the_lenient_mean_alone(data: Path) -> None:
    metrics = all_answered(data, "It is red.\nblue")
    assert metrics[0].value == 0
    assert metrics[-1].name == "mean, answer in first line"
    assert metrics[-1].value == pytest.approx((1 / 4 + 0 + 1 / 4 + 1 / 4 + 0) / 5)  # without letters
    assert all_answered(data, "It is reddish.")[-1].value == 0


def test_a_missing_data_set_says_how_to_make_it(tmp_path: Path) -> None:
    with raises_code(
        "eval-missing-files", message="nowhere", hint="python -m milora_data emoji --output_dir ", kind=MissingData
    ):
        EmojiBenchmark().load(tmp_path / "nowhere")


def all_answered(data: Path, text: str) -> list:
    benchmark = EmojiBenchmark()
    items = benchmark.load(data)
    return benchmark.summarise([Answer(item, text, benchmark.score(item, text)) for item in items])
