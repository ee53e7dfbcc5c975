"""The eval section: checked before the training, run after it in a separate process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from milora_eval.run_suite import TrainingSuites
from milora_vl import load_model
from milora_vl.train.__main__ import main
from milora_vl.train.data import require_evaluation
from milora_vl.train.output import evaluation_commands
from milora_vl.train.settings import Recipe
from support.eval_questions import write_questions
from support.problems import raises_code
from support.train_runs import training


def test_unknown_suites_and_missing_files_are_found_early(tmp_path: Path) -> None:
    with raises_code("eval-unknown-suite", where="eval.suites", hint="did you mean emoji"):
        require_evaluation(Recipe.parse({"eval": {"suites": ["emojis"]}}))
    with raises_code("eval-missing-files", where="eval.data", message="(test.json"):
        require_evaluation(Recipe.parse({"eval": {"suites": ["emoji"], "data": str(tmp_path)}}))


def test_own_questions_are_checked_before_the_training(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    recipe = Recipe.parse({"model": "tiny", "eval": {"suites": [str(file)]}, "data": {"image_folder": "photos"}})
    with raises_code("data-missing-file", where="eval.data"):
        require_evaluation(recipe)
    file.write_text(
        json.dumps([{"question": "Why?", "answer": "no"}, {"question": "Why?", "answer": "no", "metric": "x"}])
    )
    with raises_code("own-data-unknown-metric", where="mine.json, question 2"):
        require_evaluation(recipe)
    file.write_text(json.dumps([{"question": "Why?", "answer": "no"}]))
    require_evaluation(recipe)
    (command,) = evaluation_commands(recipe, tmp_path)
    assert " ".join(command[command.index("--suite") :]).startswith(f"--suite {file} --data photos --with_base")


def test_the_commands_name_what_was_trained(tmp_path: Path) -> None:
    recipe = Recipe.parse({"model": "tiny", "eval": {"suites": ["emoji"], "data": "d", "limit": 5}})
    run = str(tmp_path)
    tail = ["--suite", "emoji", "--data", "d", "--limit", "5", "--with_base", "--output_dir", run]
    (adapter,) = evaluation_commands(recipe, tmp_path)
    assert adapter == ["-m", "milora_eval", "run", "--model", "tiny", "--adapter", run, *tail]
    (tmp_path / "config.json").touch()
    (full,) = evaluation_commands(recipe, tmp_path)
    assert full == ["-m", "milora_eval", "run", "--model", run, "--base", "tiny", *tail]


def test_a_run_after_others_is_asked_their_questions_too(tmp_path: Path) -> None:
    first = {"run": "a", "template": "plain", "eval": {"suites": ["cells/eval.json"], "data": "d", "limit": 5}}
    (tmp_path / "milora.json").write_text(json.dumps({"tasks": [first, {"run": str(tmp_path)}]}))
    recipe = Recipe.parse({"model": "tiny", "eval": {"suites": ["signs/eval.json"], "data": "d"}})
    own, earlier = (" ".join(command) for command in evaluation_commands(recipe, tmp_path))
    assert own.endswith(f"--suite signs/eval.json --data d --with_base --output_dir {tmp_path}")
    assert earlier.endswith(f"--suite cells/eval.json --data d --template plain --limit 5 --output_dir {tmp_path}")
    assert evaluation_commands(Recipe.parse({"model": "tiny"}), tmp_path) == [], (
        "a run that does not evaluate at its end"
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["--rank 4", "--train projector --method full", "--method full"])
def test_a_recipe_with_an_evaluation_leaves_scores(method: str, tiny_data: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "red"}]
    records = [
        {"id": f"colour-{i}", "image": f"{i}.png", "conversations": turns, "type": "colour", "answers": ["red"]}
        for i in range(2)
    ]
    (tiny_data / "test.json").write_text(json.dumps(records))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"eval: {{suites: [emoji], data: {tiny_data}, limit: 2}}\n")
    run = tmp_path / "run"
    assert main(training(tiny_data, run, "--recipe", str(recipe), *method.split(), "--max_steps", "1")) == 0
    assert (run / "eval" / "emoji" / "final" / "results.json").is_file()
    assert (run / "eval" / "emoji" / "base" / "results.json").is_file()
    assert "## Scores" in (run / "README.md").read_text()


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
    suites = TrainingSuites({"emoji": str(data)}, 8, template="vicuna_v1", image_aspect_ratio="pad", batch_size=4)
    model, processor = load_model("tiny")
    model.train()
    before = torch.random.get_rng_state()
    scores = suites.measure(model, processor)
    assert scores.keys() == {"eval_suite_emoji", "eval_suite_emoji_stderr"}
    assert 0 <= scores["eval_suite_emoji"] <= 100
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)


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
