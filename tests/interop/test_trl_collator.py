"""TRL's SFTTrainer with our collator on pictures, and TRL's own (slow; needs trl, which the package does not)."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.batches.processor_collator import ProcessorCollator
from milora_vl import apply_milora
from support.adapter_cases import anchors, one_rule
from support.vlm_families import processor_of
from support.vlm_runs import write_pictures

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
    fixed = anchors(trainer.model)
    trainer.train()
    assert fixed
    assert all(torch.equal(anchor, anchors(trainer.model)[name]) for name, anchor in fixed.items())
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < history[0]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "smolvlm"])
def test_a_processors_batch_is_that_of_trl(name: str, tmp_path: Path) -> None:
    """With TRL's copy of the published template and its training template, which supervises a line break more."""
    if name == "smolvlm":
        pytest.importorskip("num2words")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    templates = files("trl") / "chat_templates"
    processor = processor_of(name)
    processor.chat_template = (templates / f"{name}.jinja").read_text(encoding="utf-8")
    training = (templates / f"{name}_training.jinja").read_text(encoding="utf-8")
    theirs = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True, chat_template=training)
    ours = ProcessorCollator(processor, image_folder=write_pictures(tmp_path))
    turns = [("user", "What is it?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", "Yes, it is.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    records = [{"messages": messages[: 2 + 2 * (n % 2)], "images": [f"{n}.png"]} for n in range(4)]
    opened = [
        {
            "messages": [dict(message) for message in record["messages"]],
            "images": [Image.open(tmp_path / name).convert("RGB") for name in record["images"]],
        }
        for record in records
    ]
    batch, expected = ours(records), theirs(opened)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected if key != "labels")
    differing = expected["labels"][batch["labels"] != expected["labels"]]
    assert processor.tokenizer.decode(differing).strip() == ""
    assert (batch["labels"] != -100).sum() > 30
