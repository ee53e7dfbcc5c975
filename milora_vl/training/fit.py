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


def verdict(plan: Plan, lean: Plan, flags: str, limit: float) -> tuple[list[str], str | None]:
    """Lines for a device of `limit` GiB, and the flags that make it fit: "" as it is, None where no single change does.

    `lean` is the plan with `flags`: half precision and checkpointing, as far as it lacks them.
    """
    whole = needed(plan)
    said = f"{limit:g} GiB: {whole:.1f} GiB are needed, {OVERHEAD:g} of them for CUDA itself"
    if whole <= limit:
        return [f"fits   {said}"], ""
    found = [(what, needed(other)) for what, other in changes(plan, lean, flags) if needed(other) <= limit]
    if not found:
        return [f"does not fit {said}", "no single change is enough: more devices, a smaller rank or model"], None
    would = [f"  {what}: {size:.1f} GiB" for what, size in found[:4]]
    return [f"does not fit {said}", "what would:", *would], found[0][0]


def changes(plan: Plan, lean: Plan, flags: str) -> Iterator[tuple[str, Plan]]:
    """What a user may add to the command line, mildest first, each together with `flags`, those of `lean`."""
    if flags:
        yield flags, lean
    # Divisors alone: the batch of a step stays what it is.
    for records in (n for n in range(lean.records // 2, 0, -1) if lean.records % n == 0):
        yield f"{flags} {_batch(lean, records)}".lstrip(), _with_batch(lean, records)
    smallest = _with_batch(lean, 1)
    least = f"{flags} {_batch(lean, 1)}".lstrip() if lean.records > 1 else flags
    if plan.devices > 1 and plan.stage < 3 and plan.packed_bytes is None:
        yield f"--deepspeed zero3 {flags}".rstrip(), replace(lean, stage=3)
        yield f"--deepspeed zero3 {least}".rstrip(), replace(smallest, stage=3)
    if plan.packable and plan.packed_bytes is None and plan.stage < 3:
        packed = replace(smallest, packed_bytes=bytes_per_number("4bit", double_quant=True))
        yield f"--quantization 4bit {least}".rstrip(), packed
    if not plan.offload_weights and plan.packed_bytes is None:
        away = replace(smallest, stage=3, offload_weights=True, offload_optimizer=True)
        yield f"--deepspeed zero3_offload {least}".rstrip(), away


def _batch(plan: Plan, records: int) -> str:
    accumulation = plan.accumulation * plan.records // records
    return f"--per_device_train_batch_size {records} --gradient_accumulation_steps {accumulation}"


def _with_batch(plan: Plan, records: int) -> Plan:
    accumulation = plan.accumulation * plan.records // records
    return replace(plan, records=records, accumulation=accumulation,
                   activations=plan.activations * records / plan.records)  # fmt: skip
