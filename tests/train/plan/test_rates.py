"""Learning rates and weight decay that are in force, and warnings of those that were hardly meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llava_recipes
from milora_vl.core.policy import Target
from milora_vl.train.command import main
from milora_vl.train.plan import rates
from milora_vl.train.recipe.flags import parse
from support.plans import fitted

BOTH = "[{modules: language, method: milora, protect: 0, rank: 4}, {modules: projector, method: full}]"


def planned(*words: str) -> tuple[list[Target], list[str]]:
    """What trains, with its rates in force, and the warnings about them."""
    found, method = fitted(words), parse(words).edits.method
    train = found.recipe.train
    return rates.in_force(found.targets, train), rates.warnings(found.targets, train, method=method)


def test_rules_without_a_rate_have_the_runs_whatever_their_method() -> None:
    targets, _ = planned("--model", "tiny", "--policy", BOTH, "--learning_rate", "3e-4", "--weight_decay", "0.1")
    assert {(t.method, t.learning_rate, t.weight_decay) for t in targets} == {
        ("milora", 3e-4, 0.1),
        ("full", 3e-4, 0.1),
    }
    own = BOTH.replace("full}", "full, learning_rate: 1.0e-5, weight_decay: 0.2}")
    targets, _ = planned("--model", "tiny", "--policy", own)
    assert {(t.method, t.learning_rate, t.weight_decay) for t in targets} == {
        ("milora", 5e-5, 0.0),
        ("full", 1e-5, 0.2),
    }


def test_a_rate_that_is_hugging_faces_default_is_warned_of_with_the_rules_that_have_it() -> None:
    (warning,) = planned("--model", "tiny", "--policy", BOTH)[1]
    assert "language (milora), projector (full)" in warning
    assert "5e-05" in warning
    assert "--learning_rate" in warning
    one = BOTH.replace("full}", "full, learning_rate: 1.0e-5}")
    (warning,) = planned("--model", "tiny", "--policy", one)[1]
    assert "language (milora)" in warning
    assert "projector (" not in warning
    assert planned("--model", "tiny", "--policy", BOTH, "--learning_rate", "5e-5")[1] == []
    assert planned("--model", "tiny", "--rank", "4")[1] == []


@pytest.mark.parametrize("method", ["milora", "pissa", "random", "lora", "dora"])
def test_weight_decay_pulls_every_adapter_towards_no_update_and_needs_no_warning(method: str) -> None:
    assert planned("--model", "tiny", "--rank", "4", "--method", method, "--weight_decay", "0.1")[1] == []


def test_full_training_at_a_rate_of_adapters_is_warned_of() -> None:
    (warning,) = planned("--model", "tiny", "--method", "full")[1]
    assert "0.0002" in warning
    assert planned("--model", "tiny", "--method", "full", "--learning_rate", "2e-5")[1] == []


@pytest.mark.parametrize("name", llava_recipes.names())
def test_no_shipped_recipe_leaves_a_rate_to_the_default(name: str) -> None:
    assert planned("--recipe", name)[1] == []


def test_the_plan_and_the_run_warn_and_the_files_hold_the_rates(tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--model", "tiny", "--policy", BOTH, "--weight_decay", "0.1", "--data_path", str(tiny_data / "train.json")]
    words += ["--image_folder", str(tiny_data / "images"), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main([*words, "--dry-run", "--format", "json"]) == 0
    plan, shown = capsys.readouterr()
    assert [row["rate"] for row in json.loads(plan)["policy"]] == ["5e-05", "5e-05"]
    assert shown.count("default learning rate") == 1
    assert main(words) == 0
    shown = capsys.readouterr().err
    assert shown.count("default learning rate") == 1
    targets = json.loads((tmp_path / "run" / "policy.json").read_text(encoding="utf-8"))["targets"]
    assert {(target["learning_rate"], target["weight_decay"]) for target in targets} == {(5e-5, 0.1)}
