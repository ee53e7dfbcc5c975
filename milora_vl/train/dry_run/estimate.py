"""Formulas of memory and time: weights, gradients, optimizer states, FLOPs of a step.

Weights, gradients and optimizer follow the accounting of ZeRO (arXiv:1910.02054): 16 bytes per trained parameter,
sharded by stage. simulate.py finds the memory that a step adds.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from milora_vl.core.calibration import CAPTIONS, FACTORS, INPUTS, TEXTS
from milora_vl.core.calibration.activations import PASS_BYTES
from milora_vl.core.calibration.texts import COUNT, LENGTH
from milora_vl.core.policy import Target
from milora_vl.train.plan.launch import Strategy

GIB = 1024**3
A100_FLOPS = 312e12 * 0.4  # bf16 peak times the utilization of LLaVA's scripts
FLOAT32_FLOPS = 15e12  # A100 without TF32
BANDWIDTH = 1.55e12 * 0.6  # bytes a second of an A100 with 40 GB, times the share that matrix-vector products reach
SMOKE_STEPS = 10  # a run with fewer steps is a smoke test, and calibrates with a tenth
DECOMPOSITION = 1.8  # products of out x in x min(out, in) that the factors of a weight cost: 1.4 to 2.0 measured
SMOKE_NOTE = f"a run of fewer than {SMOKE_STEPS} steps is a smoke test: it calibrates with a tenth"
CPU_BANDWIDTH = 1e10  # of one thread
LAYER, TOKENS = 2e-3, 400  # seconds of a layer without work, and tokens of a forward of the calibration
LIVE = 1_000_000_000  # stage3_max_live_parameters, sub_group_size: parameters gathered, or stepped, at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Input of the estimates. `stage` is the ZeRO stage, 0 without DeepSpeed; FSDP2 shards what stage 3 shards."""

    total: int  # parameters of the base model
    adapters: int  # trained parameters in adapters
    anchors: int  # frozen copies of initial factors
    full: int  # parameters of modules that train in full
    fixed: int = 0  # numbers in the factors that never change, in float32
    base_bytes: float  # per frozen parameter that is not packed
    packable: int = 0  # frozen parameters that quantisation packs
    packed_bytes: float | None = None  # per packed parameter; None: not quantised
    stage: int
    fsdp: Strategy | None = None
    devices: int
    records: int  # per device and micro-step
    tokens: int  # of one record, image tokens included
    accumulation: int
    checkpointing: bool
    half: bool  # activations in 16 bits
    activations: float  # peak bytes that a micro-step adds
    base_kl: float = 0.0  # tokens of the texts of `base_kl` that a step reads too, on average
    base_kl_activations: float = 0.0  # and the peak bytes that they add
    optimizer_bytes: float = 8.0  # per trained parameter: two moments of Adam; 2.0 with 8 bits
    offload_optimizer: bool = False
    offload_weights: bool = False

    @property
    def trained(self) -> int:
        """Return the number of parameters with an optimizer state."""
        return self.adapters + self.full


def memory(work: Workload) -> dict[str, float]:
    """Return bytes per device, by purpose.

    DeepSpeed in bf16 keeps 16-bit trained weights and a float32 copy; FSDP2 trains float32 weights. With
    `shard_grad_op` it keeps all gathered weights from the forward to the backward.
    """
    share = work.devices if work.stage == 3 else 1
    grads = work.devices if work.stage >= 2 else 1
    states = work.devices if work.stage >= 1 else 1
    narrow = 2 if work.stage and work.half and work.fsdp is None else 4
    gathered = work.total if work.fsdp == "shard_grad_op" else min(LIVE, work.total)
    master = 4 if narrow == 2 else 0
    on_device, weights_here = not work.offload_optimizer, not work.offload_weights
    # The optimizer step of DeepSpeed casts gradients to float32, after activations are freed; ZeRO-3 casts in parts.
    copies = 4 * min(work.trained / states, LIVE if work.stage == 3 else math.inf) * on_device if master else 0
    activations = work.activations + work.base_kl_activations
    working = "activations" if activations >= copies else "float32 gradients at the step"
    anchor = work.base_bytes if work.packed_bytes is None else 4  # packed weights: float32 anchors
    sizes = {
        "frozen weights": frozen_weights(work) / share * weights_here,
        "anchors (never sharded)": work.anchors * anchor,
        "fixed factors": 4 * work.fixed,
        "trained weights": work.trained * narrow / share * weights_here,
        "gradients": work.trained * narrow / grads,
        "buckets of DDP": work.trained * narrow * (work.stage == 0 and work.devices > 1),
        "optimizer": work.trained * (work.optimizer_bytes + master) / states * on_device,
        "gathered layers": gathered * work.base_bytes * (work.stage == 3 and work.devices > 1),
        working: max(activations, copies),
    }
    return {name: size for name, size in sizes.items() if size}


def frozen_weights(work: Workload) -> float:
    """Return the bytes of frozen weights; PEFT keeps the original of a module that trains in full."""
    frozen = work.total if work.adapters else work.total - work.full
    if work.packed_bytes is None:
        return frozen * work.base_bytes
    return (frozen - work.packable) * work.base_bytes + work.packable * work.packed_bytes


def host_memory(work: Workload) -> float:
    """Return the bytes per process that offloading moves to host memory."""
    share = work.devices if work.stage == 3 else 1
    states = work.devices if work.stage >= 1 else 1
    weights = (frozen_weights(work) + work.trained * 2) / share * work.offload_weights
    return weights + work.trained * (work.optimizer_bytes + 4) / states * work.offload_optimizer


def flops_per_step(work: Workload) -> float:
    """Return the floating-point operations of one optimizer step on one device.

    Per parameter and token: 2 in forward, 2 in backward for activations, 2 more if the parameter trains. The anchor of
    an adapter runs forward and backward too. Checkpointing repeats the forward pass. The texts of `base_kl` also run
    through the base alone, forward.
    """
    passes = 4 + 2 * work.checkpointing
    through = work.total + work.adapters + work.anchors + work.fixed
    token = passes * through + 2 * work.trained
    return work.accumulation * work.records * work.tokens * token + work.base_kl * (token + 2 * work.total)


# The share of a layer's input directions that hold a share of its activation energy: SmolLM2-135M, means over layers.
DIRECTIONS = ((0.0, 0.0), (0.6, 0.06), (0.8, 0.18), (0.9, 0.36), (0.95, 0.54), (0.99, 0.82), (1.0, 1.0))
_SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def expected_directions(target: Target) -> int:
    """Return about how many input directions a target protects; only the calibration finds the number.

    >>> expected_directions(Target(path="a", shape=(8, 100), tower=None, method="lora", protect=0.85))
    27
    """
    share = target.protect
    (low, few), (high, many) = next(pair for pair in itertools.pairwise(DIRECTIONS) if pair[1][0] >= share)
    expected = round((few + (many - few) * (share - low) / (high - low)) * target.shape[1])
    return min(expected, target.shape[1] - (target.rank or 0))


def distinct_inputs(targets: Sequence[Target]) -> list[Target]:
    """Return one target with protected inputs for each input that several layers read: q, k, v, and gate, up."""
    found: dict[tuple[str, str], Target] = {}
    for target in targets:
        if target.protect:
            parent, _, leaf = target.path.rpartition(".")
            group = next((",".join(sorted(names)) for names in _SAME_INPUT if leaf in names), leaf)
            found.setdefault((parent, group), target)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a model runs on a machine, computed from the speed of a matrix product by `planned_pace`."""

    token: float  # seconds of a token in a forward of many
    written: float  # seconds of a token that the model writes, in a batch of texts
    flops: float  # float32 operations a second
    bandwidth: float  # bytes a second


def planned_pace(model: Any, flops: float | None = None, bandwidth: float = CPU_BANDWIDTH) -> Pace:
    """Return the pace of a model, which may be on the meta device, on an A100 or at `flops` operations a second.

    An A100 reads the weights in half precision once for each step of 16 texts. A CPU needs twice as long for a token
    that it writes as for one that it reads, and LAYER seconds for each layer of a forward, however small it is.
    """
    parameters = sum(p.numel() for p in model.parameters())
    if flops is None:
        return Pace(2 * parameters / A100_FLOPS, 2 * parameters / BANDWIDTH / 16, FLOAT32_FLOPS, BANDWIDTH)
    least = LAYER * model.config.get_text_config().num_hidden_layers
    return Pace(2 * parameters / flops + least / TOKENS, 4 * parameters / flops + least / COUNT, flops, bandwidth)


def part_of(count: int, steps: int) -> int:
    """Return how many of `count` texts, pictures or records calibrate a run: a tenth in a smoke test.

    >>> part_of(64, 9), part_of(64, 10)
    (7, 64)
    """
    return count if steps >= SMOKE_STEPS else -(-count // 10)


def start_seconds(
    pace: Pace,
    inputs: Sequence[Target],
    *,
    texts: int,
    captions: int,
    picture_tokens: int,
    decomposed: Sequence[Target],
    earlier_tokens: float = 0,
) -> dict[str, float]:
    """Return about the seconds of each slow part before the first step, by the names of their progress bars.

    `inputs` are the `distinct_inputs`, `earlier_tokens` the tokens in records of earlier tasks. A caption has 112
    tokens beside its picture, of which the model writes 32. The factors of a weight take DECOMPOSITION times as long as
    a product of its size (docs/performance.md).
    """
    row = picture_tokens + 112
    seconds = {
        TEXTS: texts * LENGTH * pace.written,
        CAPTIONS: captions * (row * pace.token + 32 * pace.written),
        INPUTS: calibration_seconds(pace, inputs, texts * LENGTH + captions * row + earlier_tokens) if inputs else 0.0,
        FACTORS: DECOMPOSITION * sum(2.0 * math.prod(t.shape) * min(t.shape) for t in decomposed) / pace.flops,
    }
    return {name: value for name, value in seconds.items() if value}


def calibration_seconds(pace: Pace, inputs: Sequence[Target], tokens: float) -> float:
    """Return about the seconds that a machine needs to find the protected directions of these inputs.

    Each pass over the calibration runs the model and sums C of 2 GiB of inputs; a pass ends at its last layer, so it
    runs half of the model on average. Sums and eigenvectors are in float32.

    The eigenvalue solver first makes C tridiagonal. This reads the rest of C once for each column: 4/3 n^3 bytes, and
    memory, not arithmetic, limits it (Wang et al., "Extracting the Potential of Emerging Hardware Accelerators for
    Symmetric Eigenvalue Decomposition"). The other steps are products with about 6 n^3 operations.
    """
    sizes = [float(target.shape[1]) for target in inputs]
    passes = math.ceil(4 * sum(size**2 for size in sizes) / PASS_BYTES)
    products = sum(size**2 * tokens + 6 * size**3 for size in sizes)  # half of C suffices: it is symmetric
    read = sum(4 / 3 * size**3 for size in sizes)
    return pace.token * tokens * (passes + 1) / 2 + products / pace.flops + read / pace.bandwidth


def start_lines(seconds: Mapping[str, float], where: str) -> list[str]:
    """Return the time of a run before its first step, and on this machine that of each part."""
    whole = (
        f"start  about {duration_text(sum(seconds.values()))} on {where} before the first step; later starts reuse it"
    )
    return [whole, *(f"       {name:<31}  {duration_text(value)}" for name, value in seconds.items())]


def measured_flops(size: int = 1024, device: torch.device | str = "cpu") -> float:
    """Return the float32 operations per second of a device, measured with a matrix product."""
    a = torch.ones(size, size, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)  # slower ones waited for other programs


def size_text(size: float) -> str:
    """Return a number of bytes as text.

    >>> size_text(3 * GIB), size_text(6_000_000)
    ('3.0 GiB', '6 MiB')
    """
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{math.ceil(size / 1024**2)} MiB"


def duration_text(seconds: float) -> str:
    """Return a time as text; short times have two digits.

    >>> duration_text(7500), duration_text(41), duration_text(0.0123)
    ('2.1 h', '41 s', '0.012 s')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.2g} s"
