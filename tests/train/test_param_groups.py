"""Each trained parameter gets the rates of its own rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from milora_vl import Policy, apply_milora, load_adapter, parameter_groups, save_adapter
from milora_vl.interop.trainer import RatesOfRules
from support.problems import raises_problem

RULES: list[dict[str, Any]] = [
    {"modules": "language", "method": "milora", "protect": 0, "rank": 4, "learning_rate": 2e-4, "weight_decay": 0.1},
    {"modules": "language.layers[0].mlp", "learning_rate": 1e-4},
    {"modules": "projector", "method": "full"},
]


def test_groups_follow_the_rules(tiny_llava: Callable[..., Any]) -> None:
    model = apply_milora(tiny_llava()[0], Policy.parse(RULES))
    decays = {name for name, p in model.named_parameters() if p.requires_grad and "bias" not in name}
    groups = parameter_groups(model, learning_rate=2e-5, weight_decay=0.01, decays=decays)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (2e-4, 0.1, 22),
        (1e-4, 0.1, 6),  # gate, up and down of layer 0, A and B each
        (2e-5, 0.01, 2),
        (2e-5, 0.0, 2),  # the projector's biases
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in groups) == len(trained)


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
    """A single rate is that of the earlier training, and the new one may choose another."""
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
