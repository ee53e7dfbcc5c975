"""TRL's SFTTrainer with our collator, on pictures (slow; needs trl, which the package itself does not)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milora_data.collate import ImageTextCollator
from milora_vl import apply_milora
from support.adapter_cases import one_rule

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
trl = pytest.importorskip("trl")


def test_sft_trains_on_records_with_pictures(tiny_llava: Any, tiny_data: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    model, processor = tiny_llava()
    records = json.loads((tiny_data / "train.json").read_text())[:8]  # with a picture each: one schema for `datasets`
    collator = ImageTextCollator(
        processor.tokenizer,
        processor.image_processor,
        image_tokens=16,
        image_token_id=model.config.image_token_id,
        image_folder=tiny_data / "images",
    )
    trainer = trl.SFTTrainer(
        model=apply_milora(model, one_rule()),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_steps=4,
            per_device_train_batch_size=4,
            logging_steps=1,
            learning_rate=1e-2,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        data_collator=collator,
        train_dataset=Dataset.from_list(records),
        processing_class=processor,
    )
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < history[0]
