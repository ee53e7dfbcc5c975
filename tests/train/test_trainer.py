"""What our Trainer adds to HF's: an error where nothing is supervised or the loss is no number, token-weighted eval."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from milora_data import ImageTextCollator
from milora_vl import load_adapter, parameter_groups, save_adapter
from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.adapter.rates import RatesOfRules
from milora_vl.core.policy import Policy
from milora_vl.interop.base_kl import BaseKL
from milora_vl.models.tiny import tiny_tokenizer
from milora_vl.train.callbacks import FrozenTowers, KeepDigits
from milora_vl.train.trainer import MiloraTrainer
from support.calibrated import llava_batches
from support.problems import raises_code, raises_problem


class Encoded(ImageTextCollator):
    """Rows that are encoded already."""

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


class Row(dict[str, Any]):
    place, turns, images, videos = "", (), (), ()


def row(seed: int, supervised: int) -> Row:
    ids = torch.randint(5, 200, (10,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Row(input_ids=ids, labels=[-100] * (10 - supervised) + ids[10 - supervised :])


@pytest.fixture
def make(tiny_llama: Callable[..., Any], tmp_path: Path) -> Callable[..., MiloraTrainer]:
    def factory(
        train: list[Any], evaluation: list[Any] | None = None, base_kl: BaseKL | None = None, **options: Any
    ) -> MiloraTrainer:
        rules = [{"modules": "language", "method": "milora", "protect": 0, "rank": 4}]
        model = apply_milora(tiny_llama()[0], Policy.parse(rules))
        arguments = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = TrainingArguments(
            output_dir=str(tmp_path), label_names=["labels"], prediction_loss_only=True,
            logging_nan_inf_filter=False, **(arguments | options),
        )  # fmt: skip
        return MiloraTrainer(
            model, args, targets=model.milora_targets, checkpoint_kind="adapter",
            data_collator=Encoded(tiny_tokenizer()), train_dataset=train, eval_dataset=evaluation,
            base_kl=base_kl,
        )  # fmt: skip

    return factory


def test_what_never_changes_keeps_its_digits_when_deepspeed_rounds_the_model(tiny_llama: Callable[..., Any]) -> None:
    model = apply_milora(tiny_llama()[0], [{"modules": "language", "method": "milora", "protect": 0, "rank": 4}])
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "lora_A" in name}
    keeper = KeepDigits(model)
    model.bfloat16()
    keeper.on_train_begin(*[cast("Any", None)] * 3, model=model)
    assert before
    assert all(model.get_buffer(name).equal(buffer) for name, buffer in before.items())
    assert model.state_dict().keys() >= {name for name in before if name.endswith("weight")}


@pytest.mark.parametrize("tower", ["language", "vision"])
def test_a_frozen_vision_tower_computes_no_gradients_with_checkpointing(
    tower: str, tiny_llava: Callable[..., Any]
) -> None:
    model = apply_milora(tiny_llava()[0], [{"modules": tower, "method": "lora", "rank": 2}]).train()
    base = model.get_base_model()
    base.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    FrozenTowers().on_train_begin(*[cast("Any", None)] * 3, model=model)
    found: list[bool] = []
    last = base.model.vision_tower.encoder.layers[-1]
    last.register_forward_hook(lambda _, __, output: found.append(output.requires_grad))
    (batch, *_) = llava_batches(base)
    model(**batch).logits.float().square().mean().backward()
    assert any(found) is (tower == "vision")
    assert any(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_a_batch_with_nothing_to_learn_is_an_error(make: Callable[..., MiloraTrainer]) -> None:
    with raises_code("", message="nothing in the batch is supervised") as error:
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


def test_the_evaluation_loss_is_per_token_whatever_the_batch(make: Callable[..., MiloraTrainer]) -> None:
    rows = [row(1, 1), row(2, 9), row(3, 4)]
    losses = [make(rows, rows, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (1, 2, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)


class Gradients(TrainerCallback):
    """Keep the gradient of each step."""

    def __init__(self) -> None:
        self.of_steps: list[Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **objects: Any) -> None:
        self.of_steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def test_one_step_in_n_has_n_times_the_gradient_of_the_term(make: Callable[..., MiloraTrainer]) -> None:
    text = {"input_ids": torch.arange(5, 15)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}

    def gradients(base_kl: BaseKL | None) -> tuple[Tensor, dict[int, float], list[float]]:
        # two batches, then one, in each epoch of two steps: neither divides 3
        options = {"max_steps": 7, "gradient_accumulation_steps": 2, "learning_rate": 0.0, "max_grad_norm": 0.0}
        trainer = make([row(i, 5) for i in range(3)], None, base_kl, per_device_train_batch_size=1, **options)
        generator = torch.Generator().manual_seed(0)
        for parameter in (p for p in trainer.trained().parameters() if p.requires_grad):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        trainer.add_callback(found := Gradients())
        trainer.train()
        terms = {entry["step"]: entry["base_kl"] for entry in trainer.state.log_history if "base_kl" in entry}
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return torch.stack(found.of_steps), terms, losses

    task, _, losses = gradients(None)
    always, terms, losses_beside = gradients(BaseKL([text], 0.5, 1))
    third, terms_of_third, _ = gradients(BaseKL([text], 0.5, 3))
    assert losses_beside == losses, "the loss that is logged is the task's"
    assert [*terms] == [1, 2, 3, 4, 5, 6, 7]
    assert terms_of_third == {step: terms[step] for step in (3, 6)}
    scale = (always - task).abs().max()
    assert scale > 0
    for step in range(7):
        times = 3 if step in (2, 5) else 0
        torch.testing.assert_close(
            third[step] - task[step], times * (always[step] - task[step]), rtol=0, atol=1e-4 * scale
        )


RULES: list[dict[str, Any]] = [
    {"modules": "language", "method": "milora", "protect": 0, "rank": 4, "learning_rate": 2e-4, "weight_decay": 0.1},
    {"modules": "language.layers[0].mlp", "learning_rate": 1e-4},
    {"modules": "projector", "method": "full"},
]


TWO_RATES: list[dict[str, Any]] = [
    {"modules": "language", "method": "milora", "protect": 0, "rank": 4, "learning_rate": 2e-4},
    {"modules": "projector", "method": "full", "learning_rate": 2e-5},
]


def trained_parts(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def first_step(optimizer: torch.optim.Optimizer) -> list[str]:
    """The warnings of the first steps of an optimizer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step()
    return [str(warning.message) for warning in caught if "ignores rules" in str(warning.message)]


def test_the_rates_come_from_the_model_and_the_arguments_fill_the_gaps(tiny_llava: Callable[..., Any]) -> None:
    model = apply_milora(tiny_llava()[0], RULES)
    wrapped = nn.Sequential(nn.Linear(2, 2), model)  # as TRL wraps a model with a value head
    groups = parameter_groups(wrapped, learning_rate=2e-5, weight_decay=0.01)
    found = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert found == {(2e-4, 0.1): 22, (1e-4, 0.1): 6, (2e-5, 0.01): 3, (2e-5, 0.0): 3}
    with raises_problem():
        parameter_groups(nn.Linear(2, 2), learning_rate=1.0)
    with raises_problem(where="learning_rate", message="-0.001"):
        parameter_groups(model, learning_rate=-1e-3)


def test_an_optimizer_without_the_rates_of_the_rules_warns_once_and_names_them(tiny_llava: Callable[..., Any]) -> None:
    model = apply_milora(tiny_llava()[0], TWO_RATES)
    assert first_step(torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=1.0)) == []  # of a foreign model
    [message] = first_step(torch.optim.AdamW(trained_parts(model), lr=2e-4))
    assert "learning_rate 2e-05 of projector (it has 0.0002)" in message
    assert "language" not in message
    assert first_step(torch.optim.AdamW(trained_parts(model), lr=1.0)) == []  # once for a model


def test_the_groups_of_the_rules_do_not_warn_also_under_a_schedule(tiny_llava: Callable[..., Any]) -> None:
    model = apply_milora(tiny_llava()[0], TWO_RATES)
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    assert first_step(optimizer) == []
    plain = apply_milora(tiny_llava()[0], [{"modules": "language", "method": "milora", "protect": 0, "rank": 4}])
    assert first_step(torch.optim.AdamW(trained_parts(plain), lr=1.0)) == []  # the rules have no rates


def test_a_loaded_adapter_warns_only_if_its_rules_differ(tiny_llava: Callable[..., Any], tmp_path: Path) -> None:
    """A single rate is the earlier training's, and the new one may choose another."""
    for name, rules, count in (("two", TWO_RATES, 1), ("one", TWO_RATES[:1], 0)):
        save_adapter(apply_milora(tiny_llava()[0], rules), tmp_path / name)
        again = load_adapter(tiny_llava()[0], tmp_path / name, is_trainable=True)
        assert len(first_step(torch.optim.AdamW(trained_parts(again), lr=2e-4, weight_decay=0.0))) == count


def test_a_trainer_of_hugging_face_trains_with_two_rates(
    tiny_llava: Callable[..., Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    class MyTrainer(RatesOfRules, Trainer):
        pass

    def rates(kind: type[Trainer]) -> set[float]:
        model = apply_milora(tiny_llava()[0], TWO_RATES)
        rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [5, 6, 7]}] * 4
        arguments = TrainingArguments(str(tmp_path), max_steps=1, learning_rate=1e-3, report_to="none", use_cpu=True)
        trainer = kind(model, arguments, train_dataset=rows)
        trainer.train()
        assert trainer.optimizer is not None
        return {group["initial_lr"] for group in trainer.optimizer.param_groups}

    assert rates(MyTrainer) == {2e-4, 2e-5}
    assert not [warning for warning in recwarn if "ignores rules" in str(warning.message)]
    assert rates(Trainer) == {1e-3}
    assert [warning for warning in recwarn if "ignores rules" in str(warning.message)]
