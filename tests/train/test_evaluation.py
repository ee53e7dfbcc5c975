"""The eval section: checked before the training, run after it in a separate process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milora_vl.train.command import main
from milora_vl.train.finish import evaluation_commands
from milora_vl.train.recipe import Recipe
from milora_vl.train.setup import require_evaluation
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
@pytest.mark.parametrize("method", [["--rank", "4"], ["--method", "projector"], ["--method", "full"]])
def test_a_recipe_with_an_evaluation_leaves_scores(method: list[str], tiny_data: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "red"}]
    records = [
        {"id": f"colour-{i}", "image": f"{i}.png", "conversations": turns, "type": "colour", "answers": ["red"]}
        for i in range(2)
    ]
    (tiny_data / "test.json").write_text(json.dumps(records))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"eval: {{suites: [emoji], data: {tiny_data}, limit: 2}}\n")
    run = tmp_path / "run"
    assert main(training(tiny_data, run, "--recipe", str(recipe), *method, "--max_steps", "1")) == 0
    assert (run / "eval" / "emoji" / "final" / "results.json").is_file()
    assert (run / "eval" / "emoji" / "base" / "results.json").is_file()
    assert "## Scores" in (run / "README.md").read_text()
