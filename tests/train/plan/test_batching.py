"""Steps counted here are those that HF's Trainer takes."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from milora_vl.train.setup import Batching


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
