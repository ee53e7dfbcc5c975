"""The part of a dry run that says what a run costs: memory per device and time, both estimates.

Whether a plan fits a device, and what to change where it does not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from milora_vl.models.image_tokens import image_tokens
from milora_vl.models.quantized import bytes_per_number, is_quantized
from milora_vl.plan.batching import Batching
from milora_vl.plan.estimate import (
    A100_FLOPS,
    GIB,
    Plan,
    duration,
    flops_per_step,
    host_memory,
    measured_flops,
    memory,
    protected_bytes,
    svd_flops,
)
from milora_vl.plan.first_batch import Counts
from milora_vl.plan.screen import trained_sizes
from milora_vl.plan.simulate import Shape, simulate
from milora_vl.policy import Target
from milora_vl.towers import find_towers

MIX665K = Counts(tokens=700, learnt=60, exact=False)  # per record, roughly
FEW = (2, 3)  # layers that are simulated; each further one adds what the third did


@dataclass(frozen=True, slots=True)
class Costs:
    """What a run costs, ready to print, and the flags that make it fit: "" as it is, None where nothing does."""

    lines: list[str]
    change: str | None = ""


def costs_of(
    train: dict[str, Any],
    config: Any,
    base: nn.Module,
    targets: Sequence[Target],
    counts: Counts | None,
    batching: Batching,
    packed_bytes: float | None,
    *,
    has_steps: bool,
    gpu_memory: float | None = None,
    is_here: bool = True,
) -> Costs:
    """Memory by purpose and the time of the run; by this machine's processor too where the run `is_here`."""
    plan = plan_of(train, config, base, targets, counts or MIX665K, batching, packed_bytes)
    missing = {"bf16": not plan.half, "activation_checkpointing": not plan.checkpointing}
    frugal = {name: True for name, lacks in missing.items() if lacks}
    flags = " ".join(f"--{name.replace('activation', 'gradient')} True" for name in frugal)
    lean = plan
    if frugal:
        lean = plan_of(train | frugal, config, base, targets, counts or MIX665K, batching, packed_bytes)
    sizes, leanest = memory(plan), sum(memory(lean).values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size >= 0.05 * GIB)
    stage = f"ZeRO-{plan.stage}" if plan.stage else "no ZeRO"
    devices = f"{plan.devices} device{'s' if plan.devices > 1 else ''}"
    whole = f"memory about {sum(sizes.values()) / GIB:.1f} GiB per device ({stage}, {devices})"
    out = [f"{whole}: {parts}" if parts else whole]
    if host_memory(plan):
        out.append(f"       and {host_memory(plan) / GIB:.1f} GiB of the host's for each device (offloaded)")
    if leanest < min(0.9 * sum(sizes.values()), sum(sizes.values()) - 0.05 * GIB):
        out.append(f"       with {flags} about {leanest / GIB:.1f} GiB")
    change: str | None = ""
    if gpu_memory is not None:
        lines, change = verdict(plan, lean, flags, gpu_memory)
        out += lines
    here, step = measured_flops(), flops_per_step(plan)
    rows = [("one A100 per device at 40 % of its peak", A100_FLOPS), ("this machine's CPU", here)]
    for name, rate in rows if is_here else rows[:1]:
        total = f", {duration(batching.steps * step / rate)} in all" if has_steps else ""
        out.append(f"time   about {duration_of_step(step / rate)} a step on {name}{total}")
    if is_here and svd_flops(targets):
        out.append(f"factors about {duration(svd_flops(targets) / here)} once, on this machine's CPU")
    return Costs(out, change)


def activations(config: Any, base: nn.Module, targets: Sequence[Target], shape: Shape) -> float:
    """Bytes that a micro-step adds at its worst moment: simulated with few layers, the rest added up."""
    text = config.get_text_config()
    layers, towers = text.num_hidden_layers, find_towers(base)
    found = []
    for few in (min(count, layers) for count in FEW):
        small = copy.deepcopy(config)
        small.get_text_config().num_hidden_layers = few
        if small.get_text_config().to_dict().get("layer_types"):
            small.get_text_config().layer_types = text.layer_types[:few]
        own = [t for t in targets if t.tower != "language" or (towers.block_of(t.path) or 0) < few]
        found.append(simulate(small, own, shape).activations)
    return found[1] + (found[1] - found[0]) * (layers - FEW[1])


def shape_of(config: Any, plan: Plan, counts: Counts, *, checkpointing: bool) -> Shape:
    """What one device computes in a micro-step of a plan."""

    sees = "vision_config" in config.to_dict()
    return Shape(
        records=plan.records,
        tokens=max(plan.tokens, 2),
        learnt=int(counts.learnt * plan.records),
        pictures=math.ceil(plan.records * counts.records) if sees else 0,
        image_tokens=image_tokens(config) if sees else 0,
        half=plan.half,
        checkpointing=checkpointing,
        base_dtype=torch.bfloat16 if plan.half else torch.float32,
    )


def duration_of_step(seconds: float) -> str:
    """A step's time, with decimals where it is short."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def plan_of(
    train: dict[str, Any],
    config: Any,
    base: nn.Module,
    targets: Sequence[Target],
    counts: Counts,
    batching: Batching,
    packed_bytes: float | None,
) -> Plan:
    """The plan of a run: what is resident by counts, what a step adds by simulation.

    `packed_bytes` is what a number of a quantised base takes; None where the base is not quantised.
    """
    sizes = trained_sizes(targets, base)
    adapters = sum(sizes[t.path] for t in targets if t.rank is not None)
    half = bool(train.get("bf16") or train.get("fp16"))
    zero = (train.get("deepspeed") or {}).get("zero_optimization", {})
    plan = Plan(
        total=sum(p.numel() for p in base.parameters()),
        adapters=adapters,
        anchors=sum(sizes[t.path] for t in targets if t.has_anchor),
        full=sum(sizes.values()) - adapters,
        protected_bytes=sum(protected_bytes(t, 2.0 if half and packed_bytes is None else 4.0) for t in targets),
        base_bytes=2.0 if half else 4.0,
        packable=0 if not adapters else sum(_numel(m) for path, m in base.named_modules() if is_quantized(path, m)),
        packed_bytes=packed_bytes,
        stage=int(zero.get("stage", 0)),
        devices=batching.num_devices,
        records=batching.per_device,
        tokens=int(counts.tokens),
        accumulation=batching.accumulation,
        checkpointing=bool(train.get("activation_checkpointing")),
        half=half,
        activations=0.0,
        optimizer_bytes=2.0 if "8bit" in str(train.get("optim", "")) else 8.0,
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_weights=_offloads(zero, "offload_param"),
    )
    shape = shape_of(config, plan, counts, checkpointing=plan.checkpointing)
    return replace(plan, activations=activations(config, base, targets, shape))


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") != "none"


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
