"""Every kind of arm trains and is measured."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from milora_vl import apply_milora
from milora_vl.sweep.cells import Cell
from studies.rivals import kl_off_target
from studies.study import Study
from studies.train import run_cell

pytestmark = pytest.mark.filterwarnings("ignore:too little calibration data")  # tiny tasks
ARMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"policy": [{"modules": "language", "method": "full"}]},
    "protected": {"method": "milora", "protect": 0.95},
    "own": {"rival": {"kind": "own", "weight": 1.0}},
    "off-target": {"rival": {"kind": "off-target", "weight": 1.0}},
    "later": {"rival": {"kind": "own", "weight": 1.0, "every": 4}},
}
STUDY = Study.model_validate({
    "question": "Which?", "task": "smollm2", "steps": 1, "batch_size": 4, "arms": ARMS, "learning_rates": [1e-2],
    "policy": [{"modules": "language", "method": "lora", "rank": 4}], "reference": "lora",
})  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("factors")


@pytest.mark.parametrize("arm", ARMS)
def test_every_kind_of_arm_trains_a_step(arm: str, topics: Any, cache: Path) -> None:
    result, items = run_cell(topics, STUDY, Cell(arm, 1e-2, None, 0), cache)
    assert result["forgetting"] != 0
    assert isfinite(result["validation_loss"])
    assert items.keys() == {record.id for record in topics.test}


def test_the_term_off_the_target_leaves_out_the_token_that_is_right(topics: Any) -> None:
    model = apply_milora(topics.model(), STUDY.rules("lora", 1e-2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    batch = next(topics.batches(4, 0))

    def others() -> list[Tensor]:
        logits, labels = topics.at_answers(model, batch)
        rows = [(row, int(label)) for row, label in zip(logits.flatten(0, 1), labels.flatten(), strict=True)]
        return [torch.cat([row[:label], row[label + 1 :]]).double().log_softmax(0) for row, label in rows if label >= 0]

    with torch.no_grad():
        after = others()
        with model.disable_adapter():
            before = others()
        expected = fmean(
            float(kl_div(one, base, log_target=True, reduction="sum")) for one, base in zip(after, before, strict=True)
        )
        assert float(kl_off_target(topics, model, batch)) == pytest.approx(expected, rel=1e-3)
