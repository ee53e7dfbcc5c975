"""Arms with the product's fixed A, rivals, OSF and a scaled adapter: each trains a step and is measured."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.osf import OSFLayer

from milora_vl.sweep.cells import Cell
from studies.study import Study, parse_study
from studies.tasks.smollm2 import NamedTopics
from studies.train import _osf, run_cell
from support.machine import fastest

ARMS: dict[str, dict[str, Any]] = {
    "default": {"method": "gradient", "protect": 0.95},
    "rest": {"rival": {"kind": "rest", "weight": 1.0}},
    "own": {"rival": {"kind": "own", "weight": 1.0}},
    "mix": {"rival": {"kind": "mix", "weight": 1.0}},
    "later": {"rival": {"kind": "own", "weight": 1.0, "every": 4}},
    "rows": {"method": "gradient", "protect": 0.95, "rows": {"of": "gradient", "off_weight": "half"}},
    "kore": {"method": "gradient", "protect": 0.95, "rows": {"of": "weight"}},
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


@pytest.fixture(scope="module")
def half() -> Any:
    with fastest("bfloat16"):
        made = NamedTopics("tiny-text")
    made.validation, made.test, made.probes["text"] = made.validation[:8], made.test[:8], made.probes["text"][:1]
    return made


@pytest.mark.parametrize("arm", ["default", "own", "osf", "lora"])
def test_arms_train_a_step_on_a_base_in_bfloat16(arm: str, half: Any, study: Study, tmp_path: Path) -> None:
    assert {parameter.dtype for parameter in half.base.parameters()} == {torch.bfloat16}
    result, _ = run_cell(half, study, Cell(arm, 1e-2, None, 0), tmp_path)
    assert result["forgetting"] > 0
    assert isfinite(result["validation_loss"])


@pytest.mark.parametrize("precision", ["task", "half"])
def test_osf_starts_as_its_base_and_trains_off_the_first_directions(
    precision: str, study: Study, request: pytest.FixtureRequest
) -> None:
    task = request.getfixturevalue(precision)
    batch, base, model = next(task.batches(4, 0)), task.model(), _osf(task.model(), study.rules("osf", 1e-2))
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {parameter.dtype for parameter in base.parameters()}
    loss = task.loss(model, batch)
    assert loss.item() == pytest.approx(task.loss(base, batch).item(), rel=1e-3)
    loss.backward()
    for layer in (module for module in model.modules() if isinstance(module, OSFLayer)):
        U, _, Vh = torch.linalg.svd(layer.base_layer.weight.float(), full_matrices=False)
        low, rank = layer.osf_svd_params["default"], layer.effective_rank["default"]
        for part, first in ((low["U_low"].grad, U[:, :rank].T), (low["V_low"].grad.T, Vh[:rank])):
            assert (first @ part).abs().max() < 1e-4 * part.abs().max()


def test_a_scaled_adapter_is_that_of_lora_and_a_term_changes_the_training(task: Any, study: Study, cache: Path) -> None:
    updates = {arm: run_cell(task, study, Cell(arm, 1e-2, None, 0), cache)[0] for arm in ("lora", "half", "mix")}
    assert updates["half"]["update"] == pytest.approx(updates["lora"]["update"] / 2)
    assert updates["mix"]["validation_loss"] != updates["lora"]["validation_loss"]
