"""`--eval_suite_every N`: scores of a small suite in the log and the report, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from milora_eval.evaluate import Suites
from milora_vl import load_model
from milora_vl.train.command import main
from milora_vl.train.recipe import Recipe
from milora_vl.train.setup import require_evaluation
from support.eval_questions import write_questions
from support.problems import raises_code
from support.train_runs import training


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    """A recipe with a suite of a few questions, in the evaluation after the training too."""
    file = tmp_path / "recipe.yaml"
    data = write_questions(tmp_path / "questions")
    file.write_text(f"eval: {{suites: [emoji], data: {data}, limit: 2, suite_limit: 8}}\n")
    return file


def log_of(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "trainer_state.json").read_text())["log_history"])


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(run) if "loss" in entry]


def test_measuring_changes_nothing_of_the_model(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "questions")
    suites = Suites({"emoji": str(data)}, 8, template="vicuna_v1", image_aspect_ratio="pad")
    model, processor = load_model("tiny")
    model.train()
    before = torch.random.get_rng_state()
    scores = suites.measure(model, processor)
    assert scores.keys() == {"eval_suite_emoji", "eval_suite_emoji_stderr"}
    assert 0 <= scores["eval_suite_emoji"] <= 100
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_own_questions_are_scored_during_and_after_the_training(tiny_data: Path, tmp_path: Path) -> None:
    """Their pictures are in the image folder of the training, far from the file."""
    questions, recipe = tmp_path / "mine.json", tmp_path / "recipe.yaml"
    questions.write_text(json.dumps([{"image": "0.png", "question": "What is it?", "answer": "red"}]))
    recipe.write_text(f"eval: {{suites: [{questions}]}}\n")
    best = ["--metric_for_best_model", "suite_mine", "--load_best_model_at_end", "--eval_strategy", "steps"]
    steps = ["--eval_steps", "1", "--save_steps", "1", "--max_steps", "2", "--eval_data_path", tiny_data / "val.json"]
    words = [*best, *map(str, steps), "--eval_suite_every", "1"]
    assert main(training(tiny_data, tmp_path / "run", "--recipe", str(recipe), "--rank", "4", *words)) == 0
    assert [entry["step"] for entry in log_of(tmp_path / "run") if "eval_suite_mine" in entry][:2] == [1, 2]
    results = json.loads((tmp_path / "run" / "eval" / "mine" / "final" / "results.json").read_text())
    assert (results["suite"], results["benchmarks"][0]["reference"]) == ("mine", "data:mine")


@pytest.mark.slow
def test_scores_are_in_the_log_and_the_report_and_change_no_loss(tiny_data: Path, recipe: Path, tmp_path: Path) -> None:
    flags = ["--rank", "4", "--max_steps", "5", "--logging_steps", "1", "--gradient_checkpointing", "--dropout", "0.1"]
    with_suite, without = tmp_path / "with", tmp_path / "without"
    main(training(tiny_data, with_suite, "--recipe", str(recipe), *flags, "--eval_suite_every", "2"))
    measured = [entry for entry in log_of(with_suite) if "eval_suite_emoji" in entry]
    assert [entry["step"] for entry in measured] == [2, 4, 5]
    assert all(0 <= entry["eval_suite_emoji"] <= 100 for entry in measured)
    assert all("eval_suite_emoji_stderr" in entry for entry in measured)
    main(training(tiny_data, without, *flags))
    assert losses(with_suite) == losses(without)
    assert (with_suite / "plots" / "suite.png").is_file()
    assert "Scores of a small suite during training" in (with_suite / "report.html").read_text()


@pytest.mark.slow
def test_a_score_chooses_the_best_checkpoint(tiny_data: Path, recipe: Path, tmp_path: Path) -> None:
    best = ["--metric_for_best_model", "eval_suite_emoji", "--load_best_model_at_end", "--eval_strategy", "steps"]
    steps = ["--eval_steps", "2", "--save_steps", "2", "--max_steps", "4", "--eval_data_path", tiny_data / "val.json"]
    words = [*best, *map(str, steps), "--eval_suite_every", "4"]
    main(training(tiny_data, tmp_path / "run", "--recipe", str(recipe), "--rank", "4", *words))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    scores = {e["step"]: e["eval_suite_emoji"] for e in state["log_history"] if "eval_suite_emoji" in e}
    assert state["best_metric"] == max(state["best_metric"], *scores.values())
    assert state["best_model_checkpoint"]


def test_a_suite_must_be_named(recipe: Path) -> None:
    with raises_code("flag-needs-another", where="eval.suite_every", hint="suites: [quick]"):
        require_evaluation(Recipe.parse({"eval": {"suite_every": 5}}))
