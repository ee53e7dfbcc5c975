"""Whether a plan fits a device, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from milora_vl.quantized import bytes_per_number
from milora_vl.training.estimate import GIB, Plan, memory

OVERHEAD = 1.0  # GiB for CUDA itself, its libraries and what the allocator cannot use


def needed(plan: Plan) -> float:
    """GiB on one device, CUDA's own included."""
    return sum(memory(plan).values()) / GIB + OVERHEAD


def verdict(plan: Plan, checkpointed: float, limit: float) -> list[str]:
    """Lines for a device of `limit` GiB; `checkpointed` is what activations take with checkpointing."""
    whole = needed(plan)
    if whole <= limit:
        return [f"fits   {limit:g} GiB: {whole:.1f} GiB are needed, {OVERHEAD:g} of them for CUDA itself"]
    lines = [f"does not fit {limit:g} GiB: {whole:.1f} GiB are needed, {OVERHEAD:g} of them for CUDA itself"]
    found = [
        f"  {what}: {needed(other):.1f} GiB" for what, other in changes(plan, checkpointed) if needed(other) <= limit
    ]
    lines += (
        ["what would:", *found[:4]] if found else ["no single change is enough: more devices, a smaller rank or model"]
    )
    return lines


def changes(plan: Plan, checkpointed: float) -> Iterator[tuple[str, Plan]]:
    """What a user may change, mildest first, each together with those before it that cost no speed."""
    best = plan
    if not plan.checkpointing:
        best = replace(plan, checkpointing=True, activations=checkpointed)
        yield "--gradient_checkpointing True", best
    records = best.records
    while records > 1:
        records //= 2
        accumulation = best.accumulation * best.records // records
        yield (
            f"--per_device_train_batch_size {records} --gradient_accumulation_steps {accumulation}"
            + (" --gradient_checkpointing True" if best is not plan else ""),
            replace(
                best, records=records, accumulation=accumulation, activations=best.activations * records / best.records
            ),
        )
    smallest = replace(best, records=1, activations=best.activations / best.records)
    if plan.devices > 1 and plan.stage < 3 and plan.packed_bytes is None:
        yield "--deepspeed zero3", replace(best, stage=3)
        yield "--deepspeed zero3, and a batch of 1 per device", replace(smallest, stage=3)
    if plan.packable and plan.packed_bytes is None and plan.stage < 3:
        packed = replace(smallest, packed_bytes=bytes_per_number("4bit", double_quant=True))
        yield "--quantization 4bit, and a batch of 1 per device", packed
    if not plan.offload_weights and plan.packed_bytes is None:
        away = replace(smallest, stage=3, offload_weights=True, offload_optimizer=True)
        yield "--deepspeed zero3_offload, and a batch of 1 per device", away
