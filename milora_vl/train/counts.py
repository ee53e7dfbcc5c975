"""Counts of a run: steps and batches, trained numbers, work of a step, seconds of the start. Memory is in
`models.memory_plan`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import psutil
from torch import nn
from transformers.trainer_pt_utils import get_model_param_count

from milora_vl.common.cli.console import amount
from milora_vl.core.calibration.activations import ROOM
from milora_vl.core.calibration.texts import COUNT, HELD_OUT_TEXTS, LENGTH, ROWS
from milora_vl.core.policy import Target
from milora_vl.models.base import Base
from milora_vl.models.devices import quantized_layers
from milora_vl.models.memory_plan import GIB, Workload, activations
from milora_vl.train.launch import Launch
from milora_vl.train.settings import CalibrationConfig, Recipe, Request, value_of


def num_devices(request: Request) -> int:
    return request.devices or int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """What decides the number of steps, counted as HF's Trainer counts them. With `max_steps` -1 the epochs decide."""

    num_records: int | None  # of what a batch consists of; None: a stream
    per_device: int
    accumulation: int = 1
    num_devices: int = 1
    epochs: float = 3.0
    max_steps: int = -1
    drop_last: bool = False
    unit: Literal["record", "packed row"] = "record"

    @classmethod
    def of(cls, recipe: Recipe, num_records: int | None, num_devices: int) -> Batching:
        train = recipe.train
        return cls(
            num_records=None if recipe.data.streaming else num_records,
            per_device=value_of(train, "per_device_train_batch_size"),
            accumulation=value_of(train, "gradient_accumulation_steps"),
            num_devices=num_devices,
            epochs=value_of(train, "num_train_epochs"),
            max_steps=value_of(train, "max_steps"),
            drop_last=value_of(train, "dataloader_drop_last"),
            unit="packed row" if recipe.data.packing else "record",
        )

    @property
    def total(self) -> int:
        """Return the records, or packed rows, per optimizer step over all devices."""
        return self.per_device * self.accumulation * self.num_devices

    @property
    def steps_per_epoch(self) -> int:
        if self.num_records is None:
            return self.max_steps
        round_ = math.floor if self.drop_last else math.ceil
        batches = round_(self.num_records / (self.per_device * self.num_devices))
        return max(batches // self.accumulation + (batches % self.accumulation > 0), 1)

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the whole run.

        >>> Batching(num_records=665_298, per_device=16, num_devices=8, epochs=1).steps
        5198
        """
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)

    def describe(self) -> str:
        devices = f"{self.num_devices} device{'s' if self.num_devices > 1 else ''}"
        return f"{self.per_device} x {self.accumulation} accumulation x {devices} = {self.total}"

    def describe_steps(self) -> str:
        if self.num_records is None:
            return f"{self.steps:,} ({amount(self.steps * self.total, self.unit)} of a stream)"
        epochs = f"{self.steps / self.steps_per_epoch:.3g}"
        return f"{self.steps:,} ({epochs} epoch{'' if epochs == '1' else 's'} of {amount(self.num_records, self.unit)})"


def trained_sizes(targets: Sequence[Target], base: nn.Module) -> dict[str, int]:
    """Return the number of trained parameters of each target by path: its adapter's, else all.

    A tied head counts 0: it shares the weight of the embeddings.
    """
    sizes: dict[str, int] = {}
    seen: set[nn.Parameter] = set()
    for target in targets:
        module = base.get_submodule(target.path)
        if target.rank:
            sizes[target.path] = target.adapter_size
            continue
        weight = next(module.parameters())
        sizes[target.path] = 0 if weight in seen else get_model_param_count(module)
        seen.add(weight)
    return sizes


A100, CPU = "one A100 per device at 40 % of peak", "the CPU of this machine"
A100_FLOPS, A100_MEMORY = 312e12 * 0.4, 79 * GIB  # bf16 peak times the utilization of LLaVA's scripts
# Of float32 products, and of memory in bytes a second: an A100 without TF32, times the share that matrix-vector
# products reach; one thread of a CPU.
FLOAT32_FLOPS, BANDWIDTH, CPU_BANDWIDTH = 15e12, 1.55e12 * 0.6, 1e10
LINKS = 2e11  # bytes a second that a device gathers from the others, over NVLink
SMALL_MODEL = 1e9  # parameters of a model that trains on a CPU
SMOKE_STEPS = 10  # a run with fewer steps is a smoke test, and calibrates with a tenth
SMOKE_NOTE = f"a run of fewer than {SMOKE_STEPS} steps is a smoke test: it calibrates with a tenth"
DECOMPOSITION = 1.8  # products of out x in x min(out, in) that the factors of a weight cost: 1.4 to 2.0 measured
LAYER, TOKENS = 2e-3, 400  # seconds of a layer without work, and tokens of a forward of the calibration
NUM_RECORDS = 128  # of each earlier task in a calibration


@dataclass(frozen=True, slots=True)
class Counts:
    """Mean tokens and mean supervised tokens per record or packed row, with `records` per row."""

    tokens: float
    supervised: float
    records: float = 1.0
    has_pictures: bool = True  # any record that was read


MIX665K = Counts(tokens=700, supervised=60)  # approximate, per record


def workload_of(launch: Launch, base: Base, targets: Sequence[Target], counts: Counts, batching: Batching) -> Workload:
    model, sizes, train = base.meta, trained_sizes(targets, base.meta), launch.train
    adapters = sum(sizes[t.path] for t in targets if t.rank is not None)
    zero = (launch.deepspeed or {}).get("zero_optimization", {})
    offloads = {
        name for name in ("optimizer", "param") if (zero.get(f"offload_{name}") or {}).get("device", "none") != "none"
    }
    work = Workload(
        total=num_parameters(model),
        adapters=adapters,
        anchors=sum(sizes[t.path] for t in targets if t.has_anchor),
        full=sum(sizes.values()) - adapters,
        fixed=sum((t.rank or 0) * t.shape[1] for t in targets if t.has_fixed_A),
        packable=sum(num_parameters(model.get_submodule(path)) for path in quantized_layers(model)) * bool(adapters),
        stage=3 if launch.fsdp else launch.zero_stage,
        fsdp=launch.fsdp,
        devices=batching.num_devices,
        records=batching.per_device,
        tokens=max(int(counts.tokens), 2),
        supervised=int(counts.supervised * batching.per_device),
        # Other processors decide by the size of a picture what the tower computes; `tokens` has its tokens.
        pictures=math.ceil(batching.per_device * counts.records) if base.kind == "llava" else 0,
        image_tokens=base.tokens_of_a_picture,
        accumulation=batching.accumulation,
        checkpointing=bool(train.get("activation_checkpointing")),
        half=bool(train.get("bf16") or train.get("fp16")),
        optimizer_bytes=2.0 if "8bit" in str(train.get("optim", "")) else 8.0,
        offload_optimizer="optimizer" in offloads,
        offload_weights="param" in offloads,
    )
    # The loss of FSDP2 keeps the logits of the supervised positions in float32, and their gradients.
    logits = 2 * 4 * work.supervised * base.config.get_text_config().vocab_size if launch.fsdp else 0
    return replace(work, activations=activations(base, targets, work) + logits)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def part_of(count: int, steps: int) -> int:
    """Return how many of `count` texts, pictures or records calibrate a run: a tenth in a smoke test.

    >>> part_of(64, 9), part_of(64, 10)
    (7, 64)
    """
    return count if steps >= SMOKE_STEPS else -(-count // 10)


_SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def distinct_inputs(targets: Sequence[Target]) -> list[Target]:
    """Return one target with protected inputs for each input that several layers read: q, k, v, and gate, up."""
    found: dict[tuple[str, str], Target] = {}
    for target in targets:
        if target.protect:
            parent, _, leaf = target.path.rpartition(".")
            group = next((",".join(sorted(names)) for names in _SAME_INPUT if leaf in names), leaf)
            found.setdefault((parent, group), target)
    return list(found.values())


def start_seconds(
    base: Base,
    targets: Sequence[Target],
    calibration: CalibrationConfig | None,
    *,
    num_tasks: int,
    steps: int,
    devices: int,
    stage: int,
    flops: float | None,
    row: float,
) -> float:
    """Return about the seconds before the first step of a run of `steps` steps: on A100s, or at `flops` on a CPU.

    `targets` get new adapters. With `calibration` the base writes texts, describes pictures (`row` tokens; 0: no
    pictures) and runs on both, and the inputs of the protected layers are decomposed. A caption has 112 tokens beside
    its picture; the base writes 32 of them. An A100 reads the weights in half precision once for each step of 16
    texts. A CPU needs twice as long for a token that it writes as for one that it reads, and LAYER seconds for each
    layer of a forward, however small it is.

    Processes share the texts, captions, inputs and weights. Each pass over the calibration runs the model in all,
    and sums C of the inputs that fit beside it, and as much on what is held out; a pass ends at its last layer, so
    it runs half of the model on average. The eigenvalue solver makes C tridiagonal, which reads the rest of C once
    for each column: 4/3 n^3 bytes, limited by memory; the other steps are products with about 6 n^3 operations.
    With `stage` 3 of ZeRO, each forward of a model that does not fit twice on a device gathers its weights.
    """
    size = num_parameters(base.meta)
    layers = LAYER * base.config.get_text_config().num_hidden_layers
    gathers = stage == 3 and flops is None and 4 * size > A100_MEMORY
    if flops is None:
        token, written, products, bandwidth = 2 * size / A100_FLOPS, size / BANDWIDTH / 8, FLOAT32_FLOPS, BANDWIDTH
        if gathers:
            token, written = token + 2 * size / LINKS / ROWS / LENGTH, written + size / LINKS / 8
    else:
        token, written = 2 * size / flops + layers / TOKENS, 4 * size / flops + layers / COUNT
        products, bandwidth = flops, CPU_BANDWIDTH
    texts = captions = 0
    if calibration is not None:
        texts = part_of(calibration.num_samples + HELD_OUT_TEXTS if calibration.num_samples else 0, steps)
        captions = part_of(calibration.num_pictures, steps) if base.reads_pictures and row else 0
    caption = (base.tokens_of_a_picture or min(row, 700)) + 112
    share = 1 / devices
    seconds = share * (texts * LENGTH * written + captions * (caption * token + 32 * written))
    inputs = [float(target.shape[1]) for target in distinct_inputs(targets)]
    if inputs:
        tokens = texts * LENGTH + captions * caption + part_of(NUM_RECORDS, steps) * num_tasks * (row or LENGTH)
        free = (
            psutil.virtual_memory().available
            if flops
            else max(A100_MEMORY - 2 * size / (devices if gathers else 1), GIB)
        )
        passes = math.ceil(share * 8 * sum(n**2 for n in inputs) / (ROOM * free))
        seconds += token * tokens * (passes + 1) / 2
        seconds += share * sum((n**2 * tokens + 6 * n**3) / products + 4 / 3 * n**3 / bandwidth for n in inputs)
    matrices = [target for target in targets if target.is_decomposed]
    return seconds + share * DECOMPOSITION * sum(2.0 * math.prod(t.shape) * min(t.shape) for t in matrices) / products
