"""Memory and time are arithmetic on counts; the arithmetic is checked where the answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from milora_vl.common.cli.console import duration_text
from milora_vl.core.policy import Policy
from milora_vl.models.base import Base, meta_model
from milora_vl.models.devices import bytes_per_number
from milora_vl.models.memory_plan import (
    GIB,
    OVERHEAD,
    Workload,
    activations,
    flops_per_step,
    host_memory,
    memory,
    memory_savings,
    needed,
    simulate,
    verdict,
)
from milora_vl.models.tiny import tiny_llama
from milora_vl.train.counts import start_seconds
from milora_vl.train.settings import CalibrationConfig

PLAN = Workload(
    total=7_063_427_072, adapters=319_815_680, anchors=319_815_680, full=20_979_712, stage=0, devices=8,
    records=16, tokens=700, accumulation=1, checkpointing=True, half=True, activations=8 * GIB,
)  # fmt: skip


def test_without_zero_weights_and_adam_are_known_numbers() -> None:
    sizes = memory(PLAN)
    assert sizes["frozen weights"] / GIB == pytest.approx(13.1, abs=0.1)
    assert sizes["anchors (never sharded)"] / 1e9 == pytest.approx(0.64, abs=0.01)
    trained = PLAN.trained
    assert sizes["trained weights"] + sizes["gradients"] + sizes["optimizer"] == 16 * trained


@pytest.mark.parametrize(("stage", "per_number"), [(1, 2 + 2 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)])
def test_zero_shares_out_what_its_stage_says(stage: int, per_number: float) -> None:
    """16-bit weights and gradients, and 12 bytes of float32 weights and Adam, as in the ZeRO paper."""
    plain, sharded = memory(PLAN), memory(replace(PLAN, stage=stage))
    names = ("trained weights", "gradients", "optimizer")
    assert sum(sharded[name] for name in names) == pytest.approx(PLAN.trained * per_number)
    assert sharded["anchors (never sharded)"] == plain["anchors (never sharded)"]


def test_a_step_of_deepspeed_casts_gradients_when_activations_are_gone() -> None:
    everything = replace(PLAN, adapters=0, anchors=0, full=PLAN.total, stage=2, devices=1, activations=4 * GIB)
    assert memory(everything)["float32 gradients at the step"] == 4 * PLAN.total  # and DeepSpeed's own says 20 a number
    assert sum(memory(everything).values()) == 20 * PLAN.total
    assert "activations" in memory(PLAN)


def test_a_quantised_base_packs_what_is_packable_alone() -> None:
    """7B in 4 bits: 6.6 of its 7.06 billion numbers; embeddings, head, projector and tower stay in 16 bits."""
    plan = replace(PLAN, packable=6_476_005_376, packed_bytes=bytes_per_number("4bit"))
    sizes = memory(plan)
    assert sizes["frozen weights"] == pytest.approx(6_476_005_376 * 0.516 + 587_421_696 * 2, rel=1e-3)
    assert sizes["anchors (never sharded)"] == 4 * PLAN.anchors  # a packed weight has no dtype: float32
    assert not [what for what, _ in memory_savings(plan, plan, "") if "zero3" in what or "quantization" in what]
    assert not [what for what, _ in memory_savings(replace(PLAN, adapters=0), PLAN, "") if "quantization" in what]


def test_offloading_moves_states_to_the_host() -> None:
    away = replace(PLAN, stage=3, offload_optimizer=True, offload_weights=True)
    assert "optimizer" not in memory(away)
    assert host_memory(away) == pytest.approx((PLAN.total * 2 + PLAN.trained * 14) / 8)


def test_checkpointing_costs_one_more_forward() -> None:
    eager = replace(PLAN, checkpointing=False)
    assert flops_per_step(PLAN) / flops_per_step(eager) == pytest.approx(1.5, abs=0.05)


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    eager, lean = replace(PLAN, checkpointing=False, activations=120 * GIB), replace(PLAN, activations=8 * GIB)
    flag = "--gradient_checkpointing True"
    (line,), fits = verdict(PLAN, PLAN, "", 40)
    assert line.startswith("fits   40 GiB")
    assert fits
    lines, fits = verdict(eager, lean, flag, 40)
    assert lines[0].startswith("does not fit 40 GiB: needs 140.2 GiB beside 1 GiB for CUDA")
    assert lines[2].startswith(f"  {flag}: ")
    assert not fits
    small = replace(PLAN, total=1, adapters=1, anchors=1, full=0, stage=0, devices=1, activations=0.02 * GIB)
    lines, _ = verdict(small, small, "", 1)
    assert lines[0] == "does not fit 1 GiB: needs 21 MiB beside 1 GiB for CUDA"
    lines, _ = verdict(PLAN, PLAN, "", 3)
    assert lines[1].startswith("no single change is enough")
    sharded = replace(PLAN, stage=3, fsdp="full_shard", activations=0)  # the start of FSDP2 holds the whole model
    lines, _ = verdict(sharded, sharded, "", 14)
    assert (lines[0][:19], lines[2][:31]) == ("does not fit 14 GiB", '  --fsdp "" --deepspeed zero3: ')
    limit = needed(PLAN) - 0.002
    (first, *_), _ = verdict(PLAN, PLAN, "", limit)
    assert float(first.partition("needs ")[2].partition(" GiB")[0]) + OVERHEAD > limit
    odd = replace(lean, records=15, accumulation=2)
    assert {changed.records for _, changed in memory_savings(odd, odd, "")} == {15, 5, 3, 1}
    assert {changed.records * changed.accumulation for _, changed in memory_savings(odd, odd, "")} == {30}
    for flags, changed in memory_savings(eager, lean, flag):
        assert changed.records * changed.accumulation == 16
        assert flag in flags


def simulated(checkpointing: bool, records: int = 4) -> int:
    config = tiny_llama()[0].config
    targets = Policy.parse([{"modules": "language", "method": "milora", "rank": 4}]).resolve(meta_model(config))
    work = replace(PLAN, records=records, tokens=300, supervised=60, half=False, checkpointing=checkpointing)
    return max(simulate(config, targets, work))


def test_what_a_step_adds_is_simulated() -> None:
    """Twice the records, twice the activations; checkpointing takes most of them away."""
    assert simulated(True) < 0.75 * simulated(False)
    assert simulated(False, records=8) == pytest.approx(2 * simulated(False), rel=0.05)


def test_few_layers_tell_the_peak_of_all_beside_a_large_tower() -> None:
    text = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=4, vocab_size=100
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, image_size=224, patch_size=8
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=99)
    base = Base.of("towers", config)
    targets = Policy.parse([{"modules": "language", "method": "lora", "rank": 4}]).resolve(base.meta)
    work = replace(PLAN, records=4, tokens=60, supervised=40, pictures=4, image_tokens=8, half=False)
    for checkpointing in (False, True):
        work = replace(work, checkpointing=checkpointing)
        assert activations(base, targets, work) == pytest.approx(max(simulate(config, targets, work)), rel=0.02)


def test_durations_are_for_people() -> None:
    assert [duration_text(seconds) for seconds in (3, 100, 200, 3600 * 30)] == ["3 s", "1.7 min", "3.3 min", "30.0 h"]


def test_the_start_counts_devices_and_a_zero3_that_gathers_in_each_forward() -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    for layers, gathers in ((8, False), (24, True)):
        base = Base.of("text", LlamaConfig(**sizes, num_hidden_layers=layers))
        targets = Policy.parse("[{modules: language, method: milora, rank: 16}]").resolve(base.meta)
        more: Any = {"num_tasks": 0, "steps": 100, "flops": None, "row": 0}
        one, eight, zero3 = (
            start_seconds(base, targets, CalibrationConfig(), devices=devices, stage=stage, **more)
            for devices, stage in ((1, 2), (8, 2), (8, 3))
        )
        assert eight < one / 4
        assert (zero3 > eight) is gathers
