"""Memory and time of a run before it runs: arithmetic on counts, marked as estimates wherever shown.

Weights, gradients and optimizer follow ZeRO's accounting (arXiv:1910.02054), 16 bytes per trained number, shared out by
stage; what a step adds to them is simulated (simulate.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from milora_vl.policy import Target

GIB = 1024**3
A100_FLOPS = 312e12 * 0.4  # bf16 peak times the share that LLaVA's scripts reach
LIVE = 1_000_000_000  # stage3_max_live_parameters, sub_group_size: so many numbers are gathered, or stepped, at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the estimates need to know. `stage` is ZeRO's, 0 without DeepSpeed."""

    total: int  # parameters of the base model
    adapters: int  # trained numbers in adapters
    anchors: int  # frozen copies of initial factors
    full: int  # parameters that train themselves
    protected_bytes: float = 0.0  # of the directions that updates stay out of
    base_bytes: float  # per frozen number, where it is not packed
    packable: int = 0  # frozen numbers in layers that a quantised base packs
    packed_bytes: float | None = None  # per number of those; None: not quantised
    stage: int
    devices: int
    records: int  # per device and micro-step
    tokens: int  # of one record, pictures included
    accumulation: int
    checkpointing: bool
    half: bool  # activations in 16 bits
    activations: float  # bytes that a micro-step adds at its worst moment
    optimizer_bytes: float = 8.0  # per trained number: Adam's two, 2.0 with 8 bits
    offload_optimizer: bool = False
    offload_weights: bool = False

    @property
    def trained(self) -> int:
        """Numbers with an optimizer state."""
        return self.adapters + self.full


def memory(plan: Plan) -> dict[str, float]:
    """Bytes per device, by purpose. Under DeepSpeed in bf16, what trains has 16-bit weights and a float32 copy."""
    share = plan.devices if plan.stage == 3 else 1
    grads = plan.devices if plan.stage >= 2 else 1
    states = plan.devices if plan.stage >= 1 else 1
    narrow = 2 if plan.stage and plan.half else 4
    master = 4 if narrow == 2 else 0
    on_device, weights_here = not plan.offload_optimizer, not plan.offload_weights
    # DeepSpeed's step casts a group's gradients to float32, when activations are gone; ZeRO-3 a part of them at a time.
    copies = 4 * min(plan.trained / states, LIVE if plan.stage == 3 else math.inf) * on_device if master else 0
    working = "activations" if plan.activations >= copies else "float32 gradients at the step"
    anchor = plan.base_bytes if plan.packed_bytes is None else 4  # packed weights have no dtype to keep them in
    sizes = {
        "frozen weights": frozen_weights(plan) / share * weights_here,
        "anchors (never sharded)": plan.anchors * anchor,
        "protected directions": plan.protected_bytes,
        "trained weights": plan.trained * narrow / share * weights_here,
        "gradients": plan.trained * narrow / grads,
        "buckets of DDP": plan.trained * narrow * (plan.stage == 0 and plan.devices > 1),
        "optimizer": plan.trained * (plan.optimizer_bytes + master) / states * on_device,
        "gathered layers": min(LIVE, plan.total) * plan.base_bytes * (plan.stage == 3 and plan.devices > 1),
        working: max(plan.activations, copies),
    }
    return {name: size for name, size in sizes.items() if size}


def frozen_weights(plan: Plan) -> float:
    """Bytes of all that stays; PEFT keeps the original beside a module that trains in full."""
    frozen = plan.total if plan.adapters else plan.total - plan.full
    if plan.packed_bytes is None:
        return frozen * plan.base_bytes
    return (frozen - plan.packable) * plan.base_bytes + plan.packable * plan.packed_bytes


def host_memory(plan: Plan) -> float:
    """Bytes per process that offloading puts into the host's memory."""
    share = plan.devices if plan.stage == 3 else 1
    states = plan.devices if plan.stage >= 1 else 1
    weights = (frozen_weights(plan) + plan.trained * 2) / share * plan.offload_weights
    return weights + plan.trained * (plan.optimizer_bytes + 4) / states * plan.offload_optimizer


def flops_per_step(plan: Plan) -> float:
    """Floating-point operations of one optimizer step on one device.

    Forward 2 per parameter and token, backward 2 for activations and 2 for each trained weight; the anchored half of an
    adapter runs forward and backward too; checkpointing repeats the forward.
    """
    tokens = plan.records * plan.tokens * plan.accumulation
    passes = 4 + 2 * plan.checkpointing
    through = plan.total + plan.adapters + plan.anchors
    return tokens * (passes * through + 2 * plan.trained)


def svd_flops(targets: Sequence[Target]) -> float:
    """Operations for initial factors and protected directions, some 4 m n min(m, n) a matrix for each of them.

    That is what the search takes for large matrices: 3.0 and 3.4 were measured at 4096 x 11008 and 4096 x 4096.
    """
    return float(
        sum(
            4 * t.shape[0] * t.shape[1] * min(t.shape[:2]) * ((t.part is not None) + (t.protect is not None))
            for t in targets
            if t.rank is not None
        )
    )


def protected_bytes(target: Target, base_bytes: float) -> float:
    """Bytes for the directions that the update of a target stays out of, U and V in float32.

    A hard constraint keeps the anchor in float32 too; `base_bytes` a number are counted for it elsewhere.
    """
    if target.protect is None or target.rank is None:
        return 0.0
    wider = (4 - base_bytes) * target.rank if target.protect.is_hard and target.has_anchor else 0.0
    return (4 * target.protect.top + wider) * sum(target.shape)


def measured_flops(size: int = 1024) -> float:
    """What this machine multiplies per second in float32, measured in a moment."""
    a = torch.ones(size, size)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)  # the others waited for something


def duration(seconds: float) -> str:
    """For people.

    >>> duration(7500), duration(41)
    ('2.1 h', '41 s')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
