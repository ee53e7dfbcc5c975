"""TRL's trainers with the model that apply_milora returns (slow; needs trl, which the package itself does not)."""

from __future__ import annotations

import gc
import json
import math
import runpy
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.encode.templates import render_chat_template
from milora_vl import apply_milora, calibration_texts, load_model, save_adapter
from milora_vl.interop.base_kl import BaseKLCallback
from support.adapter_cases import anchors, move, one_rule
from support.calibrated import directions, leaks
from support.documented import ROOT
from support.versions import needs_spans
from support.vlm_families import model_of, processor_of
from support.vlm_runs import record, write_pictures

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


FAMILIES = ["llava", pytest.param("qwen2_vl", marks=needs_spans)]


LETTERS = "the quick brown fox jumps over the lazy dog"  # random answers share some of them


RULES = "[{modules: language, method: milora, rank: 2, protect: 0.6}]"


@pytest.fixture
def questions(tmp_path: Path) -> list[str]:
    """Two records with pictures of two sizes, as flags of the examples."""
    records = [
        record([("human", f"<image>\n{question}?"), ("gpt", answer)], [f"{n}.png"], n)
        for n, (question, answer) in enumerate([("What is it", LETTERS), ("Where", LETTERS[::-1])])
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    pictures = write_pictures(tmp_path / "images")
    return ["--data_path", str(tmp_path / "train.json"), "--image_folder", str(pictures), "--policy", RULES]


def write_chat_model(name: str, folder: Path, tiny_llava: Any) -> Path:
    """Write a tiny model that listens to its question; its processor has a chat template, as TRL needs for pictures."""
    if name == "llava":
        model, processor = tiny_llava()
        processor.chat_template = render_chat_template("vicuna_v1", processor.tokenizer)
    else:
        processor = processor_of(name)
        model = model_of(name, processor)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 4 if weight.ndim == 2 else 1  # with its small random weights, any prompt gives nearly one answer
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


def run_example(name: str, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """Run a script of examples/ with small settings; return its trainer and what it logged."""
    flags = settings(folder, **{"max_steps": 3, **more})
    words = [*words, *(str(word) for key, value in flags.items() for word in (f"--{key}", value))]
    monkeypatch.setattr(sys, "argv", [name, *words])
    trainer = runpy.run_path(str(ROOT / "examples" / name))["main"]()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def live_weights() -> dict[int, int]:
    """Return the bytes of every storage that some parameter uses."""
    gc.collect()
    parameters = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Parameter)]
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}


def check_memory(before: dict[int, int], folder: Path, model: Any) -> None:
    """Check that since `before` there are the weights of one base model and what trains, and nothing else."""
    new = sum(size for address, size in live_weights().items() if address not in before)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained
    weights = sum(p.numel() for p in load_model(folder)[0].parameters())
    assert new == 4 * (weights + trained)


def check_adapter(model: Any, folder: Path, output: Path) -> None:
    """Check that the update has grown and left the protected inputs alone, and that the saved adapter loads."""
    assert any(p.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    base, _ = load_model(folder)
    rules = yaml.safe_load(RULES)
    assert max(leaks(model, directions(base, rules, calibration_texts(base)))) < 1e-5
    load_model(folder, adapter=output)


def test_sft_of_a_text_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft_trl.py"])
    run = runpy.run_path(str(ROOT / "examples" / "sft_trl.py"))
    logged = [entry["loss"] for entry in run["trainer"].state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]
    base, _ = load_model("tiny-text")
    protected = directions(base, [{"modules": "language", "method": "milora", "rank": 2}], calibration_texts(base))
    assert max(leaks(PeftModel.from_pretrained(base, "sft-adapter"), protected)) < 1e-5
    run["trainer"].add_callback(BaseKLCallback(run["texts"], every=2))
    run["trainer"].train()
    assert [entry["base_kl"] > 0 for entry in run["trainer"].state.log_history if "base_kl" in entry] == [True, True]


@pytest.mark.parametrize("name", FAMILIES)
def test_grpo_on_pictures(name: str, questions, tiny_llava, tmp_path: Path, monkeypatch) -> None:
    """The documented script: the reference is the base without the adapter, and no second model is in memory."""
    folder, output = write_chat_model(name, tmp_path / "model", tiny_llava), tmp_path / "out"
    before = live_weights()
    more = {"beta": 0.1, "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 24}
    trainer, history = run_example("grpo_trl.py", ["--model", str(folder), *questions], output, monkeypatch, **more)
    model = trainer.model
    assert history[0]["kl"] == 0
    assert history[-1]["kl"] > 0
    assert trainer.ref_model is None
    assert list(model.peft_config) == ["default"]
    check_memory(before, folder, model)
    check_adapter(model, folder, output)


@pytest.mark.parametrize("name", FAMILIES)
def test_dpo_on_pictures(name: str, questions, tiny_llava, tmp_path: Path, monkeypatch) -> None:
    """The documented script on TRL's collator: the first loss is ln 2, because the reference is the base."""
    folder, output = write_chat_model(name, tmp_path / "model", tiny_llava), tmp_path / "out"
    asked = [{"role": "user", "content": "What is it?"}]
    answers = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "A."), ("rejected", "No"))}
    rows = [{"images": [f"{n % 2}.png"], "prompt": asked, **answers} for n in range(4)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    words = ["--model", str(folder), *questions]
    words[words.index("--data_path") + 1] = str(tmp_path / "pairs.json")
    trainer, history = run_example("dpo_trl.py", words, output, monkeypatch)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[-1]["loss"] < history[0]["loss"]
    assert list(trainer.model.peft_config) == ["default"]
    check_adapter(trainer.model, folder, output)


@pytest.mark.parametrize("way", ["hint", "adapter"])
@pytest.mark.parametrize("name", FAMILIES)
def test_self_distillation_on_pictures(
    name: str, way: str, questions, tiny_llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented script: the teacher has the weights of the student's base, and takes no further memory."""
    folder, output = write_chat_model(name, tmp_path / "model", tiny_llava), tmp_path / "out"
    hint = "One word!" if way == "hint" else ""
    if way == "adapter":
        base = load_model(folder)[0]
        student = apply_milora(base, RULES, calibration=calibration_texts(base))
        move(student, 0.5)
        save_adapter(student, tmp_path / "adapter")
    before = live_weights()
    words = ["--hint", hint] if hint else ["--adapter", str(tmp_path / "adapter")]
    words += ["--model", str(folder), *questions]
    more = {"top_k": 1, "max_steps": 8, "learning_rate": 2e-3, "max_completion_length": 6}  # greedy answers
    trainer, history = run_example("distillation_trl.py", words, output, monkeypatch, **more)
    assert min(entry["loss"] for entry in history[1:]) < history[0]["loss"]  # each has other answers
    model, shared = trainer.model, trainer.teacher_model
    assert {p.data_ptr() for p in shared.parameters()} <= {p.data_ptr() for p in model.parameters()}
    check_memory(before, folder, model)
    check_adapter(model, folder, output)


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
