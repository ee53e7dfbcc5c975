"""TRL's trainers with the model that apply_milora returns (slow; needs trl, which the package itself does not)."""

from __future__ import annotations

import copy
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from milora_data.batches.preferences import PreferenceCollator
from milora_data.batches.processor_collate import ProcessorCollator
from milora_vl import apply_milora, load_adapter, load_model
from support.adapter_cases import anchors, one_rule
from support.documented import ROOT
from support.versions import needs_places
from support.vlm_families import processor_of
from support.vlm_runs import write_model, write_pictures

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
trl = pytest.importorskip("trl")


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        **more,
    }


@pytest.fixture
def parts(tiny_llama) -> tuple[Any, Any]:
    base, tokenizer = tiny_llama()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return apply_milora(base, one_rule()), tokenizer


def data(**columns: list[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({name: values * 4 for name, values in columns.items()})


def train(trainer: Any, model: Any, tiny_llama) -> list[dict[str, float]]:
    """Train; no anchor moves, and the stock checkpoint is an adapter of ours."""
    fixed = anchors(model)
    trainer.train()
    assert all(torch.equal(anchor, anchors(model)[name]) for name, anchor in fixed.items())
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    back = load_adapter(tiny_llama()[0], checkpoint)
    ids = torch.arange(5, 15)[None]
    model.set_adapter("default")
    assert torch.allclose(back(ids).logits, model.eval()(ids).logits, atol=1e-5)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_sft(parts, tiny_llama, tmp_path: Path) -> None:
    model, tokenizer = parts
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path, max_length=64)),
        train_dataset=data(text=["hello there", "good day"]),
        processing_class=tokenizer,
    )
    history = train(trainer, model, tiny_llama)
    assert history[1]["loss"] < history[0]["loss"]


def test_dpo_starts_at_ln_2(parts, tiny_llama, tmp_path: Path) -> None:
    model, tokenizer = parts
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(tmp_path, max_length=64)),
        train_dataset=data(prompt=["hello ", "good "], chosen=["there", "day"], rejected=["x", "yy"]),
        processing_class=tokenizer,
    )
    history = train(trainer, model, tiny_llama)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[1]["loss"] < history[0]["loss"]


def test_grpo_starts_at_a_kl_of_0(parts, tiny_llama, tmp_path: Path) -> None:
    model, tokenizer = parts
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(**settings(tmp_path, beta=0.1, num_generations=2, max_completion_length=6)),
        train_dataset=data(prompt=["hello ", "good "]),
        processing_class=tokenizer,
    )
    history = train(trainer, model, tiny_llama)
    assert history[0]["kl"] == 0
    assert history[1]["kl"] > 0


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_vl", marks=needs_places)])
def test_dpo_on_pictures_from_a_recipe(name: str, tiny_llava, tmp_path: Path, monkeypatch) -> None:
    """The documented script: first loss ln 2, a lower one after it, and an adapter that loads."""
    folder, pictures = tmp_path / "model", write_pictures(tmp_path / "images")
    if name == "llava":
        for part in tiny_llava():
            part.save_pretrained(folder)
    else:
        write_model(name, folder)
    pairs = [
        {"images": [f"{n % 4}.png"], "prompt": "What is it?", "chosen": f"It is {n}.", "rejected": "Nothing at all."}
        for n in range(8)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps([*pairs, {**pairs[0], "images": []}]))
    recipe = yaml.safe_load((ROOT / "examples" / "dpo_trl.yaml").read_text())
    recipe["policy"][0] |= {"rank": 2, "alpha": 2}
    recipe["train"] |= {"logging_steps": 1, "learning_rate": 1e-2, "report_to": ["none"], "dataloader_num_workers": 1}
    recipe["train"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "warmup_steps": 0}
    if name == "llava":
        del recipe["data"]["max_pixels"]
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--recipe", tmp_path / "dpo.yaml", "--model", folder, "--data_path", tmp_path / "pairs.json"]
    words += ["--image_folder", pictures, "--output_dir", tmp_path / "out", "--max_steps", "3"]
    monkeypatch.setattr(sys, "argv", ["dpo_trl.py", *map(str, words)])
    runpy.run_path(str(ROOT / "examples" / "dpo_trl.py"), run_name="__main__")
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]
    load_model(folder, adapter=tmp_path / "out")


@needs_places
def test_a_batch_of_pairs_is_that_of_trl(tmp_path: Path) -> None:
    """Ids and completions of every row; TRL supervises the line break after an answer too."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    processor, folder = processor_of("qwen2_5_vl"), write_pictures(tmp_path)
    rows = []
    for n, text in enumerate(("a cat", "a much longer answer about a dog")):
        answers = {
            side: [{"role": "assistant", "content": f"{word} {text}"}]
            for side, word in (("chosen", "It is"), ("rejected", "No"))
        }
        rows.append({"images": [f"{n}.png"], "prompt": [{"role": "user", "content": "What is it?"}], **answers})
    ours = PreferenceCollator(ProcessorCollator(processor, image_folder=folder))(rows)
    opened = [{**copy.deepcopy(row), "images": [Image.open(folder / row["images"][0]).convert("RGB")]} for row in rows]
    theirs = DataCollatorForVisionPreference(processor)(opened)
    for row in range(4):
        keep, kept = (batch["attention_mask"][row].bool() for batch in (ours, theirs))
        assert torch.equal(ours["input_ids"][row][keep], theirs["input_ids"][row][kept])
        done = [batch["input_ids"][row][batch["completion_mask"][row].bool()].tolist() for batch in (ours, theirs)]
        assert processor.tokenizer.decode(done[1]) == processor.tokenizer.decode(done[0]) + "\n"
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(ours[key], theirs[key])
