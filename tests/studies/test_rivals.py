"""Arms with the product's fixed A, rivals, OSF and a scaled adapter: each trains a step and is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milora_vl.sweep.cells import Cell
from studies.study import Study, parse_study
from studies.tasks.smollm2 import NamedTopics
from studies.train import run_cell

ARMS: dict[str, dict[str, Any]] = {
    "default": {"method": "gradient", "protect": 0.95},
    "rest": {"rival": {"kind": "rest", "weight": 1.0}},
    "own": {"rival": {"kind": "own", "weight": 1.0}},
    "mix": {"rival": {"kind": "mix", "weight": 1.0}},
    "osf": {"osf": True},
    "half": {"scale": 0.5},
    "none": {"scale": 0.0},
    "lora": {},
}


@pytest.fixture(scope="module")
def task() -> Any:
    return NamedTopics("tiny-text")


@pytest.fixture(scope="module")
def study() -> Study:
    return parse_study(
        {"question": "Which?", "task": "smollm2", "steps": 1, "batch_size": 4, "arms": ARMS, "learning_rates": [1e-2],
         "policy": [{"modules": "language", "method": "lora", "rank": 4}], "reference": "lora"}, "test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("factors")


@pytest.mark.parametrize("arm", ARMS)
def test_every_kind_of_arm_trains_a_step(arm: str, task: Any, study: Study, cache: Path) -> None:
    result, _ = run_cell(task, study, Cell(arm, 1e-2, None, 0), cache)
    assert (result["update"] == 0) == (arm in ("none", "osf")), "a scale of 0 leaves the base; OSF's is not measured"
    assert (result["forgetting"] == 0) == (arm == "none")


def test_a_scaled_adapter_is_that_of_lora_and_a_term_changes_the_training(task: Any, study: Study, cache: Path) -> None:
    updates = {arm: run_cell(task, study, Cell(arm, 1e-2, None, 0), cache)[0] for arm in ("lora", "half", "mix")}
    assert updates["half"]["update"] == pytest.approx(updates["lora"]["update"] / 2)
    assert updates["mix"]["validation_loss"] != updates["lora"]["validation_loss"]
