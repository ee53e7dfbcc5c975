"""Learning rates and weight decay that are in force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from milora_vl.core.policy import Target
from milora_vl.train.__main__ import main
from milora_vl.train.counts import Batching
from milora_vl.train.settings import with_rates
from support.plans import fitted

BOTH = "[{modules: language, method: milora, protect: 0, rank: 4}, {modules: projector, method: full}]"


def planned(*words: str) -> list[Target]:
    found = fitted(words)
    return with_rates(found.targets, found.recipe.train)


def test_rules_without_a_rate_have_the_runs_whatever_their_method() -> None:
    targets = planned("--model", "tiny", "--policy", BOTH, "--learning_rate", "3e-4", "--weight_decay", "0.1")
    assert {(t.method, t.learning_rate, t.weight_decay) for t in targets} == {
        ("milora", 3e-4, 0.1),
        ("full", 3e-4, 0.1),
    }
    own = BOTH.replace("full}", "full, learning_rate: 1.0e-5, weight_decay: 0.2}")
    targets = planned("--model", "tiny", "--policy", own)
    assert {(t.method, t.learning_rate, t.weight_decay) for t in targets} == {
        ("milora", 2e-4, 0.0),
        ("full", 1e-5, 0.2),
    }


def test_a_rule_without_a_rate_has_that_of_the_default_policy_and_in_full_that_of_llava() -> None:
    assert {(t.method, t.learning_rate) for t in planned("--model", "tiny", "--policy", BOTH)} == {
        ("milora", 2e-4),
        ("full", 2e-5),
    }


def test_the_plan_shows_and_the_files_hold_the_rates(tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--model", "tiny", "--policy", BOTH, "--weight_decay", "0.1", "--data_path", str(tiny_data / "train.json")]
    words += ["--image_folder", str(tiny_data / "images"), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main([*words, "--dry-run", "--format", "json"]) == 0
    assert [row["rate"] for row in json.loads(capsys.readouterr().out)["policy"]] == ["0.0002", "2e-05"]
    assert main(words) == 0
    targets = json.loads((tmp_path / "run" / "policy.json").read_text(encoding="utf-8"))["targets"]
    assert {(target["learning_rate"], target["weight_decay"]) for target in targets} == {(2e-4, 0.1), (2e-5, 0.1)}


@pytest.mark.parametrize("records", [1, 7, 12])
@pytest.mark.parametrize(("per_device", "accumulation"), [(1, 8), (4, 1), (2, 3)])
@pytest.mark.parametrize(("epochs", "max_steps"), [(1.0, -1), (2.5, -1), (1.0, 5)])
def test_equal_to_the_trainers(
    tmp_path, records: int, per_device: int, accumulation: int, epochs: float, max_steps: int
) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=max_steps,
    )
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=list(range(records)))
    loader = trainer.get_train_dataloader()
    expected = trainer.set_initial_training_values(args, loader)[-1]
    counted = Batching(
        num_records=records, per_device=per_device, accumulation=accumulation, epochs=epochs, max_steps=max_steps
    )
    assert counted.steps == expected
