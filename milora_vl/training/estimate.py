"""Memory and time of a run before it runs: arithmetic on parameter counts, marked as estimates wherever shown.

Memory follows ZeRO's accounting (arXiv:1910.02054): 16 bytes per trained number for weight, gradient and Adam, shared
out by stage. Activations follow arXiv:2205.05198 (34 bytes per token, width and layer in half precision).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from milora_vl.policy import Target

GIB = 1024**3
A100_FLOPS = 312e12 * 0.4  # bf16 peak times the share that LLaVA's scripts reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the estimates need to know. `stage` is ZeRO's, 0 without DeepSpeed."""

    total: int  # parameters of the base model
    adapters: int  # trained numbers in adapters
    anchors: int  # frozen copies of initial factors
    full: int  # parameters that train themselves
    base_bytes: float  # per frozen number
    stage: int
    devices: int
    records: int  # per device and micro-step
    tokens: int  # of one record, pictures included
    supervised: int  # of one record
    accumulation: int
    width: int
    layers: int
    vocabulary: int
    checkpointing: bool
    half: bool  # activations in 16 bits

    @property
    def trained(self) -> int:
        """Numbers with an optimizer state."""
        return self.adapters + self.full


def memory(plan: Plan) -> dict[str, float]:
    """Bytes per device, by purpose."""
    share = [1, 1, 1, plan.devices][plan.stage]
    grads = [1, 1, plan.devices, plan.devices][plan.stage]
    states = [1, plan.devices, plan.devices, plan.devices][plan.stage]
    sizes = {
        "frozen weights": (plan.total - plan.full) * plan.base_bytes / share,
        "anchors (never sharded)": plan.anchors * plan.base_bytes,
        "trained weights": plan.trained * 4 / share,
        "gradients": plan.trained * 4 / grads,
        "Adam": plan.trained * 8 / states,
        "activations": _activations(plan),
        "logits": plan.records * plan.supervised * plan.vocabulary * 10,  # 16-bit, float32, and its gradient
    }
    return {name: size for name, size in sizes.items() if size}


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
    """Operations for the initial factors, some 10 m n min(m, n) a matrix."""
    return float(sum(10 * t.shape[0] * t.shape[1] * min(t.shape[:2]) for t in targets if t.part is not None))


def measured_flops(size: int = 1024) -> float:
    """What this machine multiplies per second in float32, measured in a moment."""
    a = torch.ones(size, size)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * size**3 / (time.perf_counter() - start)


def duration(seconds: float) -> str:
    """For people.

    >>> duration(7500), duration(41)
    ('2.1 h', '41 s')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _activations(plan: Plan) -> float:
    tokens = plan.records * plan.tokens
    layer = tokens * plan.width * 34 * (1 if plan.half else 2)
    if not plan.checkpointing:
        return layer * plan.layers
    return layer + tokens * plan.width * plan.layers * (2 if plan.half else 4)
