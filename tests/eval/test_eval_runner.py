"""Generating answers: resumable at any point, split over shards, with the same bytes in the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milora_eval import run_suite as evaluation
from milora_eval.answers.questions import EvaluationPlan, read_items
from milora_eval.answers.store import read_lines
from milora_eval.benchmarks.emoji import EmojiBenchmark
from milora_eval.scores.results import read_results, write_results
from support.eval_questions import write_questions

Made = tuple[Any, Any]


@pytest.fixture(scope="module")
def model(tiny_llava: Callable[..., Made]) -> Made:
    return tiny_llava()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("emoji"))


def evaluate(model: Made, data: Path, output: Path, **changed: Any) -> dict[str, Any] | None:
    plan = EvaluationPlan(suite="emoji", benchmarks=(EmojiBenchmark(),), data_dir=data, **{"batch_size": 4, **changed})
    return evaluation.evaluate(*model, plan, read_items(plan.benchmarks, data, plan.limit), output)


def answers(output: Path) -> bytes:
    return (output / "eval" / "emoji" / "final" / "predictions.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(model: Made, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted evaluation; read it or copy it."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(model, data, folder, model_name="tiny")
    return folder


@pytest.fixture
def done(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of it to change."""
    return shutil.copytree(whole, tmp_path / "done")


def test_the_files_hold_every_answer_and_number(whole: Path, data: Path) -> None:
    folder = whole / "eval" / "emoji" / "final"
    lines, results = read_lines(folder / "predictions.jsonl"), read_results(folder)
    assert results["asked"] == len(lines) == 22
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl", "results.json", "table.md"]
    first = lines[0]
    assert (first["id"], first["benchmark"], first["type"]) == ("colour-red", "emoji", "colour")
    assert (first["image"], first["image_file"]) == ("images/red.png", str(data / "images" / "red.png"))
    assert first["answers"] == ["red"]
    entry = results["benchmarks"][0]
    assert (entry["name"], entry["n"], entry["metrics"][0]["name"]) == ("emoji", 22, "mean over types")
    assert entry["truncated"] == sum("truncated" in line for line in lines) > 0
    assert (results["suite"], results["which"], results["model"]) == ("emoji", "final", "tiny")


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    model: Made, data: Path, done: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = done / "eval" / "emoji" / "final" / "predictions.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[5:14]) + b'{"id": "half a li')
    results = evaluate(model, data, done)
    assert results is not None
    assert results["asked"] == 22 - 9
    assert "9 of 22 answers are stored already" in capsys.readouterr().err
    assert answers(done) == answers(whole)


def test_shards_end_with_the_bytes_of_one_run(model: Made, data: Path, whole: Path, tmp_path: Path) -> None:
    done = [evaluate(model, data, tmp_path, shard=(number, 9)) for number in (3, 1, 2, 9, 8, 7, 6, 5, 4)]
    assert [result is not None for result in done] == [False] * 8 + [True]
    assert answers(tmp_path) == answers(whole)


def test_other_settings_make_new_answers_and_keep_the_old(model: Made, data: Path, tmp_path: Path) -> None:
    asked, texts = [], []
    for template in ("vicuna_v1", "alpaca", "vicuna_v1"):
        results = evaluate(model, data, tmp_path, template=template)
        assert results is not None
        asked.append(results["asked"])
        texts.append(answers(tmp_path))
    assert asked == [22, 22, 0]
    assert texts[0] == texts[2]


def test_a_larger_limit_asks_only_what_is_new(model: Made, data: Path, tmp_path: Path) -> None:
    asked = []
    for limit in (5, 12, 8, None):
        results = evaluate(model, data, tmp_path, limit=limit)
        assert results is not None
        asked.append((results["asked"], results["benchmarks"][0]["n"]))
    assert asked == [(5, 5), (7, 12), (0, 8), (10, 22)]


def test_what_was_measured_of_other_weights_does_not_stay_in_the_results(model: Made, data: Path, done: Path) -> None:
    folder = done / "eval" / "emoji" / "final"
    measured = read_results(folder) | {"forgetting": {"kl": 0.5, "kl_stderr": 0.1, "n_tokens": 64}}
    write_results(folder, measured)
    again = evaluate(model, data, done)
    assert again is not None
    assert again["forgetting"] == measured["forgetting"]
    other = evaluate(model, data, done, template="alpaca")
    assert other is not None
    assert other["forgetting"] is None
