"""What our Trainer adds to HF's: an error where nothing is supervised or the loss is no number, token-weighted eval."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from milora_data import ImageTextCollator
from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.policy import Policy
from milora_vl.models.tiny import tiny_tokenizer
from milora_vl.train.trainer import MiloraTrainer
from support.problems import raises_code


class Encoded(ImageTextCollator):
    """Rows that are encoded already."""

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def row(seed: int, supervised: int) -> dict[str, Any]:
    ids = torch.randint(5, 200, (10,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [-100] * (10 - supervised) + ids[10 - supervised :]}


@pytest.fixture
def make(tiny_llama: Callable[..., Any], tmp_path: Path) -> Callable[..., MiloraTrainer]:
    def factory(train: list[Any], evaluation: list[Any] | None = None, **options: Any) -> MiloraTrainer:
        rules = [{"modules": "language", "method": "milora", "rank": 4}]
        model = apply_milora(tiny_llama()[0], Policy.parse(rules))
        arguments = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = TrainingArguments(
            output_dir=str(tmp_path), label_names=["labels"], prediction_loss_only=True,
            logging_nan_inf_filter=False, **(arguments | options),
        )  # fmt: skip
        return MiloraTrainer(
            model, args, targets=model.milora_targets, checkpoint_kind="adapter",
            data_collator=Encoded(tiny_tokenizer()), train_dataset=train, eval_dataset=evaluation,
        )  # fmt: skip

    return factory


def test_a_batch_with_nothing_to_learn_is_an_error(make: Callable[..., MiloraTrainer]) -> None:
    with raises_code("train-no-supervised-tokens", message="nothing in the batch is supervised") as error:
        make([row(0, 0)]).train()
    assert error.value.exit_code == 1


def test_the_log_tells_what_was_learnt_from_and_how_it_moves(make: Callable[..., MiloraTrainer]) -> None:
    trainer = make([row(0, 5), row(1, 3)], per_device_train_batch_size=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["supervised_tokens"] == 8
        assert entry["tokens_per_second"] > 0
        assert entry["learning_rate/language"] == pytest.approx(entry["learning_rate"], rel=1e-6)


def test_a_loss_that_is_no_number_ends_the_run(make: Callable[..., MiloraTrainer]) -> None:
    trainer = make([row(0, 5)])
    with torch.no_grad():
        next(p for p in trainer.trained().parameters() if p.requires_grad).fill_(float("nan"))
    with raises_code("train-loss-not-finite", message="the loss is nan"):
        trainer.train()


def test_the_evaluation_loss_is_per_token_whatever_the_batch(make: Callable[..., MiloraTrainer]) -> None:
    rows = [row(1, 1), row(2, 9), row(3, 4)]
    losses = [make(rows, rows, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (1, 2, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)


def test_evaluation_leaves_the_random_state_alone(make: Callable[..., MiloraTrainer]) -> None:
    trainer = make([row(1, 5)], [row(2, 5)])
    before = torch.random.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), before)
