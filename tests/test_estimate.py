"""Memory and time are arithmetic on counts; the arithmetic is checked where the answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from milora_vl.training.estimate import GIB, Plan, duration, flops_per_step, memory

PLAN = Plan(
    total=7_063_427_072, adapters=319_815_680, anchors=319_815_680, full=20_979_712, base_bytes=2.0, stage=0, devices=8,
    records=16, tokens=700, supervised=60, accumulation=1, width=4096, layers=32, vocabulary=32064,
    checkpointing=True, half=True,
)  # fmt: skip


def test_without_zero_weights_and_adam_are_known_numbers() -> None:
    sizes = memory(PLAN)
    assert sizes["frozen weights"] / GIB == pytest.approx(13.1, abs=0.1)
    assert sizes["anchors (never sharded)"] / 1e9 == pytest.approx(0.64, abs=0.01)
    trained = PLAN.trained
    assert sizes["trained weights"] + sizes["gradients"] + sizes["Adam"] == 16 * trained


@pytest.mark.parametrize(("stage", "sharded"), [(1, 8), (2, 12), (3, 16)])
def test_zero_shares_out_what_its_stage_says(stage: int, sharded: int) -> None:
    plain, sharded_plan = memory(PLAN), memory(replace(PLAN, stage=stage))
    names = ("trained weights", "gradients", "Adam")
    total = sum(sharded_plan[name] for name in names)
    assert total == pytest.approx(PLAN.trained * (16 - sharded + sharded / 8))
    assert sharded_plan["anchors (never sharded)"] == plain["anchors (never sharded)"]


def test_checkpointing_trades_memory_for_one_more_forward() -> None:
    eager = replace(PLAN, checkpointing=False)
    assert memory(eager)["activations"] > 10 * memory(PLAN)["activations"]
    assert flops_per_step(PLAN) / flops_per_step(eager) == pytest.approx(1.5, abs=0.05)


def test_durations_are_for_people() -> None:
    assert [duration(seconds) for seconds in (3, 100, 200, 3600 * 30)] == ["3 s", "1.7 min", "3.3 min", "30.0 h"]
