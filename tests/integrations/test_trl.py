"""TRL's trainers with the model that apply_milora returns (slow; needs trl, which the package itself does not)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from milora_vl import apply_milora, load_adapter
from support.adapter_cases import anchors, one_rule

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
