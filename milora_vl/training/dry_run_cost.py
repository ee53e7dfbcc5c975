"""The part of a dry run that says what a run costs: memory per device and time, both estimates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from milora_vl.policy import Target
from milora_vl.training.batching import Batching
from milora_vl.training.estimate import (
    A100_FLOPS,
    GIB,
    Plan,
    duration,
    flops_per_step,
    measured_flops,
    memory,
    svd_flops,
)
from milora_vl.training.first_batch import Counts
from milora_vl.training.screen import trained_sizes

MIX665K = Counts(tokens=700, learnt=60, exact=False)  # per record, roughly
BYTES = {"none": 2.0, "8bit": 1.0, "4bit": 0.55}


def lines(
    train: dict[str, Any],
    config: Any,
    base: nn.Module,
    targets: Sequence[Target],
    counts: Counts | None,
    batching: Batching,
    quantization: str,
    *,
    has_steps: bool,
) -> list[str]:
    """Memory by purpose and the time of the run, ready to print."""
    plan = _plan(train, config, base, targets, counts or MIX665K, batching, quantization)
    sizes = memory(plan)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size >= 0.05 * GIB)
    stage = f"ZeRO-{plan.stage}" if plan.stage else "no ZeRO"
    devices = f"{plan.devices} device{'s' if plan.devices > 1 else ''}"
    whole = f"memory about {sum(sizes.values()) / GIB:.1f} GiB per device ({stage}, {devices})"
    out = [f"{whole}: {parts}" if parts else whole]
    here, step = measured_flops(), flops_per_step(plan)
    rows = [("one A100 per device at 40 % of its peak", A100_FLOPS), ("this machine's CPU", here)]
    for name, rate in rows:
        total = f", {duration(batching.steps * step / rate)} in all" if has_steps else ""
        out.append(f"time   about {duration_of_step(step / rate)} a step on {name}{total}")
    if svd_flops(targets):
        out.append(f"factors about {duration(svd_flops(targets) / here)} once, on this machine's CPU")
    return out


def duration_of_step(seconds: float) -> str:
    """A step's time, with decimals where it is short."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def zero_stage(deepspeed: Any) -> int:
    """ZeRO's stage in a DeepSpeed configuration (mapping, file or none)."""
    if isinstance(deepspeed, str):
        deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    return int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def _plan(
    train: dict[str, Any],
    config: Any,
    base: nn.Module,
    targets: Sequence[Target],
    counts: Counts,
    batching: Batching,
    quantization: str,
) -> Plan:
    sizes = trained_sizes(targets, base)
    adapters = sum(sizes[t.path] for t in targets if t.rank is not None)
    half = bool(train.get("bf16") or train.get("fp16"))
    text = config.get_text_config()
    return Plan(
        total=sum(p.numel() for p in base.parameters()),
        adapters=adapters,
        anchors=sum(sizes[t.path] for t in targets if t.has_anchor),
        full=sum(sizes.values()) - adapters,
        base_bytes=BYTES[quantization] if half or quantization != "none" else 4.0,
        stage=zero_stage(train.get("deepspeed")),
        devices=batching.num_devices,
        records=batching.per_device,
        tokens=int(counts.tokens),
        supervised=int(counts.learnt),
        accumulation=batching.accumulation,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        checkpointing=bool(train.get("activation_checkpointing")),
        half=half,
    )
