"""What a resumed run may change: recipes are compared key by key."""

from __future__ import annotations

from typing import Any

import pytest

from milora_vl.train.resume import may_change, schedule_has_end
from milora_vl.train.settings import Recipe, differences

POLICY = [
    {"modules": "language", "method": "milora", "protect": 0, "rank": 8, "alpha": 8, "learning_rate": 1e-3},
    {"modules": "projector", "method": "full", "learning_rate": 2e-5},
]


def recipe(**content: Any) -> Recipe:
    return Recipe.parse({"model": "tiny", "policy": POLICY, **content})


def refused(before: Recipe, now: Recipe) -> list[str]:
    return [key for key in differences(before, now) if not may_change(key, now)]


DECISIVE = {
    "quantization": {"quantization": "4bit"},
    "model": {"model": "tiny-text"},
    "template": {"template": "plain"},
    "data.packing": {"data": {"packing": True}},
    "data.max_length": {"data": {"max_length": 256}},
    "policy[0].rank": {"policy": [POLICY[0] | {"rank": 4}, POLICY[1]]},
    "policy[0].method": {"policy": [POLICY[0] | {"method": "lora"}, POLICY[1]]},
    "policy[0].protect": {"policy": [POLICY[0] | {"protect": 0.5}, POLICY[1]]},
    "policy[1].method": {"policy": [POLICY[0], POLICY[1] | {"method": "frozen"}]},
    **{
        f"train.{name}": {"train": {name: value}}
        for name, value in {
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
            "optim": "adafactor",
            "adam_beta2": 0.95,
            "max_grad_norm": 0.5,
            "seed": 7,
            "data_seed": 7,
            "train_sampling_strategy": "group_by_length",
            "bf16": True,
            "ignore_data_skip": True,
            "load_best_model_at_end": True,
        }.items()
    },
}


@pytest.mark.parametrize("key", DECISIVE)
def test_a_change_of_what_decides_the_weights_is_refused(key: str) -> None:
    assert refused(recipe(), recipe(**DECISIVE[key])) == [key]
    assert refused(recipe(**DECISIVE[key]), recipe()) == [key]


HARMLESS: dict[str, dict[str, Any]] = {
    "data.path": {"data": {"path": "other.json"}},  # its records are compared
    "train.num_train_epochs": {"train": {"num_train_epochs": 5}},  # the steps are compared
    "data.image_folder": {"data": {"image_folder": "elsewhere"}},
    "data.eval_path": {"data": {"eval_path": "val.json"}},
    "factor_cache": {"factor_cache": "factors"},
    "eval.forgetting_every": {"eval": {"forgetting_every": 5}},
    "train.save_steps": {"train": {"save_steps": 7}},
    "train.report_to": {"train": {"report_to": "wandb"}},
    "train.dataloader_num_workers": {"train": {"dataloader_num_workers": 4}},
    "train.push_to_hub": {"train": {"push_to_hub": True}},
    "train.activation_checkpointing": {"train": {"gradient_checkpointing": True}},
    "train.learning_rate": {"train": {"learning_rate": 0.5}},  # every rule has its own
}


@pytest.mark.parametrize("key", HARMLESS)
def test_a_change_of_what_leaves_the_weights_alone_is_allowed_and_told(key: str) -> None:
    now = recipe(**HARMLESS[key])
    assert list(differences(recipe(), now)) == [key]
    assert may_change(key, now)


def test_rates_depend_on_the_last_step_unless_the_schedule_has_no_end() -> None:
    def has_end(schedule: str, **more: Any) -> bool:
        return schedule_has_end(recipe(train={"max_steps": 10, "lr_scheduler_type": schedule, **more}))

    assert not any(map(has_end, ("constant", "constant_with_warmup", "inverse_sqrt")))
    assert all(map(has_end, ("linear", "cosine", "polynomial", "warmup_stable_decay")))
    assert has_end("constant_with_warmup", warmup_steps=0.1)  # a share of all steps
    assert not has_end("constant", warmup_steps=0.1)


def test_where_evaluations_choose_they_decide() -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps"}
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    for train in (best, plateau):
        before, now = (recipe(train={**train, "eval_steps": steps}) for steps in (5, 10))
        assert refused(before, now) == ["train.eval_steps"]


def test_a_look_at_its_beginning_cannot_tell_streams_apart() -> None:
    data = [{"path": path, "streaming": True} for path in ("a.json", "b.json")]
    before, now = (recipe(data=entry, train={"max_steps": 5}) for entry in data)
    assert refused(before, now) == ["data.path"]
