"""What a resumed run may change: recipes are compared key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llava_recipes
from milora_vl.plan.changes import Change, Side, changes, schedule_has_end, shown
from milora_vl.recipe.schema import Recipe, load
from support.plans import settings

POLICY = [
    {"modules": "language", "method": "milora", "rank": 8, "alpha": 8, "learning_rate": 1e-3},
    {"modules": "projector", "method": "full", "learning_rate": 2e-5},
]


def side(processes: int = 1, resolved: str = "float32", **content: Any) -> Side:
    filled: dict[str, Any] = {"model": "tiny", "policy": POLICY, **content}
    return Side(Recipe.parse(filled), processes, resolved)


def found(before: Side, now: Side, *, identifies_records: bool = False) -> list[Change]:
    return changes(before, now, identifies_records=identifies_records)


def refused(before: Side, now: Side, *, identifies_records: bool = False) -> list[str]:
    return [
        change.key
        for change in found(before, now, identifies_records=identifies_records)
        if change.verdict == "refused"
    ]


def test_the_same_in_other_words_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"path": "train.json", "image_folder": "images"}
    whole = {name: str(tmp_path / path) for name, path in paths.items()}
    given = {"seed": 42, "weight_decay": 0.0, "bf16": True, "warmup_ratio": 0.1}
    before = side(data=paths, model="llava-1.5-7b", dtype="bfloat16", train={"warmup_steps": 0.1})
    now = side(data=whole, model="llava-hf/llava-1.5-7b-hf", dtype="bfloat16", train=given)
    assert found(before, now) == []


DECISIVE = {
    "quantization": {"quantization": "4bit"},
    "model": {"model": "tiny-text"},
    "template": {"template": "plain"},
    "form": {"form": "residual"},
    "data.packing": {"data": {"packing": True}},
    "data.max_length": {"data": {"max_length": 256}},
    "data.path": {"data": {"path": "other.json"}},
    "policy[0].rank": {"policy": [POLICY[0] | {"rank": 4}, POLICY[1]]},
    "policy[0].method": {"policy": [POLICY[0] | {"method": "lora"}, POLICY[1]]},
    "policy[0].protect": {"policy": [POLICY[0] | {"protect": {"inputs": 0.5}}, POLICY[1]]},
    "policy[1]": {"policy": POLICY[:1]},
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
            "num_train_epochs": 5,
            "ignore_data_skip": True,
            "load_best_model_at_end": True,
        }.items()
    },
}


@pytest.mark.parametrize("key", DECISIVE)
def test_a_change_of_what_decides_the_weights_is_refused(key: str) -> None:
    assert refused(side(), side(**DECISIVE[key])) == [key]
    assert refused(side(**DECISIVE[key]), side()) == [key]


HARMLESS: dict[str, dict[str, Any]] = {
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
    (change,) = found(side(), side(**HARMLESS[key]))
    assert (change.key, change.verdict) == (key, "allowed")


def test_the_runs_rate_decides_where_a_rule_has_none() -> None:
    rules = [{"modules": "language", "method": "milora", "rank": 8}, POLICY[1]]
    before, now = ({"policy": rules, "train": {"learning_rate": rate}} for rate in (1e-3, 1e-4))
    assert refused(side(**before), side(**now)) == ["train.learning_rate"]


def test_a_rule_may_name_the_rate_that_it_had_from_the_run() -> None:
    rules = [{"modules": "language", "method": "milora", "rank": 8}]
    before = side(policy=rules, train={"learning_rate": 1e-3})
    same, other = (
        side(policy=[rules[0] | {"learning_rate": rate}], train={"learning_rate": 1e-3}) for rate in (1e-3, 1e-4)
    )
    assert found(before, same) == found(same, before) == []
    assert refused(before, other) == ["policy[0].learning_rate"]


def test_more_steps_go_with_a_schedule_that_has_no_end() -> None:
    def steps(count: int, schedule: str, **more: Any) -> Side:
        return side(train={"max_steps": count, "lr_scheduler_type": schedule, **more})

    for schedule in ("constant", "constant_with_warmup", "inverse_sqrt"):
        assert refused(steps(10, schedule), steps(20, schedule)) == []
    for schedule in ("linear", "cosine", "polynomial", "warmup_stable_decay"):
        (change,) = found(steps(10, schedule), steps(20, schedule))
        assert change.verdict == "refused"
        assert schedule in change.why
    share = {"warmup_steps": 0.1}  # a share of all steps
    assert schedule_has_end(steps(10, "constant_with_warmup", **share))
    assert not schedule_has_end(steps(10, "constant", **share))


def test_epochs_do_not_count_where_steps_are_given() -> None:
    before, now = (side(train={"max_steps": 10, "num_train_epochs": epochs}) for epochs in (1, 2))
    assert refused(before, now) == []


def test_a_batch_may_be_made_up_otherwise() -> None:
    def batch(per_device: int, accumulation: int, processes: int, **more: Any) -> Side:
        train = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation, "max_steps": 5}
        return side(processes, train=train, **more)

    assert refused(batch(4, 2, 1), batch(1, 8, 1)) == []
    assert refused(batch(4, 2, 4), batch(4, 8, 1)) == []
    (change,) = found(batch(4, 2, 4), batch(4, 2, 1))
    assert (change.before, change.now) == ("32 (4 x 2 x 4)", "8 (4 x 2 x 1)")
    assert "--gradient_accumulation_steps 8" in change.why
    streams = {"data": {"streaming": True}}
    assert "train.per_device_train_batch_size" in refused(batch(4, 2, 1, **streams), batch(1, 8, 1, **streams))


def test_where_evaluations_choose_they_decide() -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps"}
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    for train in (best, plateau):
        before, now = (side(train={**train, "eval_steps": steps}) for steps in (5, 10))
        assert refused(before, now) == ["train.eval_steps"]


def test_what_auto_means_is_compared() -> None:
    (change,) = found(side(), side(resolved="bfloat16"))
    assert (change.key, change.before, change.now, change.verdict) == ("dtype", "float32", "bfloat16", "refused")
    assert "--dtype float32" in change.why
    assert found(side(), side(dtype="float32")) == []


def test_other_files_may_hold_the_same_records() -> None:
    before, now = side(data={"path": "a.json"}), side(data={"path": "b.json"})
    assert refused(before, now) == ["data.path"]
    assert refused(before, now, identifies_records=True) == []
    streams = {"streaming": True}  # a look at its beginning cannot tell streams apart
    before, now = (side(data={"path": path, **streams}, train={"max_steps": 5}) for path in ("a.json", "b.json"))
    assert refused(before, now, identifies_records=True) == ["data.path"]


@pytest.mark.parametrize("name", llava_recipes.names())
def test_a_packaged_recipe_comes_back_from_its_file_without_a_change(name: str, tmp_path: Path) -> None:
    resolved = settings(["--recipe", name, "--model", "tiny", "--device", "cpu"]).recipe
    (tmp_path / "recipe.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
    assert found(Side(load(tmp_path / "recipe.yaml"), 1, "float32"), Side(resolved, 1, "float32")) == []


def test_values_are_shown_as_a_recipe_has_them() -> None:
    assert shown([{"path": "a.json", "weight": 1.0}]) == "[{path: a.json, weight: 1}]"
