"""The HF Trainer knows nothing of milora_vl and still saves, resumes and picks the best checkpoint rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from milora_vl import apply_milora, load_adapter
from support.adapter_cases import Tokens, anchors, one_rule

RULES = [*one_rule(dropout=0.1), {"modules": "language.mlp", "rank": 3}, {"modules": "model.norm", "method": "full"}]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def trainer(model: Any, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-2,
        "logging_steps": 1, "save_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1,
        "weight_decay": 0.1,
    }  # fmt: skip
    args = TrainingArguments(**{**settings, **options})
    rounds = iter(range(99))  # a metric whose best value is the first
    return Trainer(
        model, args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=list(callbacks),
        compute_metrics=lambda _: {"age": next(rounds)},
    )  # fmt: skip


def losses(run: Trainer) -> dict[int, float]:
    found = {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
    assert found
    return found


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(apply_milora(tiny_llama()[0], RULES), folder)
    run.train()
    return run, folder


def test_training_lowers_the_loss_and_never_moves_an_anchor(whole, tiny_llama) -> None:
    run, _ = whole
    start = anchors(apply_milora(tiny_llama()[0], RULES))
    assert losses(run)[6] < losses(run)[1]
    assert all(torch.equal(start[name], anchor) for name, anchor in anchors(run.model).items())


@pytest.mark.parametrize("way", ["load_adapter", "fresh model"])
def test_a_resumed_run_repeats_the_losses_of_an_uninterrupted_one(whole, tiny_llama, tmp_path: Path, way: str) -> None:
    first = trainer(apply_milora(tiny_llama()[0], RULES), tmp_path, StopAt(3))
    first.train()
    checkpoint = tmp_path / "checkpoint-3"
    if way == "load_adapter":
        model = load_adapter(tiny_llama()[0], checkpoint, is_trainable=True)
    else:
        model = apply_milora(tiny_llama()[0], RULES)
    second = trainer(model, tmp_path)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert losses(second) == losses(whole[0])


def test_the_best_checkpoint_is_loaded_at_the_end(tiny_llama, tmp_path: Path) -> None:
    run = trainer(
        apply_milora(tiny_llama()[0], RULES), tmp_path,
        max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="age", greater_is_better=False,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    expected = load_adapter(tiny_llama()[0], best)
    ids = Tokens().rows[:2]
    assert torch.allclose(run.model.eval()(ids).logits, expected(ids).logits, atol=1e-6)
    assert {n.split(".")[-1] for n, p in run.model.named_parameters() if p.requires_grad} == {"delta", "weight"}
