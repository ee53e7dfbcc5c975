"""What a run costs, from its plan: steps and batches, trained numbers, memory per device, seconds of start and step.

Weights, gradients and optimizer follow the accounting of ZeRO (arXiv:1910.02054): 16 bytes per trained parameter,
sharded by stage. What a step adds, above all activations, is measured by running it without data (torch's fake
tensors): every storage is counted when an operation allocates it and when it is freed, with or without checkpointing
and autocast.
"""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.trainer_pt_utils import get_model_param_count

from milora_vl.common.cli.console import amount
from milora_vl.common.compat.torch import after_operations, without_data
from milora_vl.core.adapter.anchored import install_factors
from milora_vl.core.adapter.fixed_a import Protection, fix_A
from milora_vl.core.adapter.lora import lora_layer, make_lora, set_dropout
from milora_vl.core.adapter.sidecar import read_sidecar
from milora_vl.core.calibration.activations import ROOM
from milora_vl.core.calibration.texts import COUNT, HELD_OUT_TEXTS, LENGTH
from milora_vl.core.policy import Target
from milora_vl.core.policy.towers import TOWERS, find_towers
from milora_vl.core.weights.matrices import factor_dtype
from milora_vl.models.base import Base
from milora_vl.models.devices import bytes_per_number, quantized_layers
from milora_vl.models.image_tokens import layers_of
from milora_vl.models.losses import CHUNK, GradientsAtOnce, inner_model
from milora_vl.train.launch import Launch, Strategy
from milora_vl.train.recipe import RENAMED, Recipe, Request, value_of

if TYPE_CHECKING:
    from milora_vl.train.plan import Run


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


def protected_directions(targets: Sequence[Target], protection: Mapping[str, Protection]) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for target in targets:
        if target.path in protection:
            entry = protection[target.path]
            shares.setdefault(target.tower or "other", []).append(entry.directions / entry.inputs)
    return {tower: round(sum(values) / len(values), 4) for tower, values in shares.items()}


def frozen_towers(base: nn.Module, targets: Sequence[Target]) -> list[str]:
    towers, trained = find_towers(base), {target.tower for target in targets}
    present = {"language": towers.language, "projector": towers.projector, "vision": towers.vision}
    return [tower for tower in TOWERS if present[tower] is not None and tower not in trained]


def trained_sizes(targets: Sequence[Target], base: nn.Module) -> dict[str, int]:
    """Return the number of trained parameters of each target by path: those of its adapter, else all.

    A tied head counts 0: it shares the weight of the embeddings.
    """
    sizes: dict[str, int] = {}
    seen: set[nn.Parameter] = set()
    for target in targets:
        module = base.get_submodule(target.path)
        if target.rank:
            sizes[target.path] = adapter_size(target)
            continue
        weight = next(module.parameters())
        sizes[target.path] = 0 if weight in seen else get_model_param_count(module)
        seen.add(weight)
    return sizes


def adapter_size(target: Target) -> int:
    """Return the number of trained parameters of an adapter: r (in + out), with exceptions.

    A fixed A leaves B, and DoRA trains one more number for each row of the weight.
    """
    rows, columns = target.shape
    assert target.rank is not None
    if target.has_fixed_A:
        return target.rank * rows
    return target.rank * (rows + columns) + (rows if target.method == "dora" else 0)


GIB = 1024**3
OVERHEAD = 1.0  # GiB for CUDA, its libraries and fragmentation
FEW = (2, 3)  # numbers of simulated layers; each further layer adds what the third added
A100, CPU = "one A100 per device at 40 % of peak", "the CPU of this machine"
A100_FLOPS, A100_MEMORY = 312e12 * 0.4, 79 * GIB  # bf16 peak times the utilization of LLaVA's scripts
# Of float32 products, and of memory in bytes a second: an A100 without TF32, times the share that matrix-vector
# products reach; one thread of a CPU.
FLOAT32_FLOPS, BANDWIDTH, CPU_BANDWIDTH = 15e12, 1.55e12 * 0.6, 1e10
SMALL_MODEL = 1e9  # parameters of a model that trains on a CPU
SMOKE_STEPS = 10  # a run with fewer steps is a smoke test, and calibrates with a tenth
SMOKE_NOTE = f"a run of fewer than {SMOKE_STEPS} steps is a smoke test: it calibrates with a tenth"
DECOMPOSITION = 1.8  # products of out x in x min(out, in) that the factors of a weight cost: 1.4 to 2.0 measured
LAYER, TOKENS = 2e-3, 400  # seconds of a layer without work, and tokens of a forward of the calibration
LIVE = 1_000_000_000  # stage3_max_live_parameters, sub_group_size: parameters gathered, or stepped, at once
LONG_START, FEWER_SAMPLES = 120.0, 16  # seconds, texts
NUM_RECORDS = 128  # of each earlier task in a calibration
_SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True, slots=True)
class Counts:
    """Mean tokens and mean supervised tokens per record or packed row, with `records` per row."""

    tokens: float
    supervised: float
    records: float = 1.0
    has_pictures: bool = True  # any record that was read


MIX665K = Counts(tokens=700, supervised=60)  # approximate, per record


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a run as lines to print, and the flags that make it fit: "" if it fits, None if no flags help."""

    lines: list[str]
    change: str | None = ""

    @property
    def fits(self) -> bool:
        return self.change == ""


def costs_of(run: Run, counts: Counts, batching: Batching, *, has_steps: bool) -> Costs:
    base, request = run.base, run.request
    work = _work_of(run, counts, batching)
    frugal = [flag for flag, has in (("bf16", work.half), ("gradient_checkpointing", work.checkpointing)) if not has]
    flags = " ".join(f"--{flag} True" for flag in frugal)
    lean = _work_of(run, counts, batching, *frugal) if frugal else work
    sizes, leanest = memory(work), sum(memory(lean).values())
    whole = sum(sizes.values())
    stage = "FSDP2" if work.fsdp else f"ZeRO-{work.stage}" if work.stage else "no ZeRO"
    line = f"memory about {size_text(whole)} per device ({stage}, {amount(work.devices, 'device')})"
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size >= 0.05 * GIB)
    out = [f"{line}: {parts}" if parts else line]
    if base.own_pictures:
        out.append("       and the activations of the vision tower, which depend on the sizes of the pictures")
    if host_memory(work):
        out.append(f"       and {host_memory(work) / GIB:.1f} GiB of host memory per device (offloaded)")
    if leanest < min(0.9 * whole, whole - 0.05 * GIB):
        out.append(f"       with {flags} about {size_text(leanest)}")
    change: str | None = ""
    if request.gpu_memory is not None:
        lines, change = verdict(work, lean, flags, request.gpu_memory)
        out += lines
    is_planned = request.devices is not None or request.gpu_memory is not None
    on_cpu = work.total < SMALL_MODEL and not torch.cuda.is_available() and not is_planned
    flops, where = (measured_flops(), CPU) if on_cpu else (A100_FLOPS, A100)
    step = flops_per_step(work) / flops
    total = f", {duration_text(batching.steps * step)} in total" if has_steps else ""
    steps = batching.steps if has_steps else SMOKE_STEPS
    start = start_seconds(run, steps, flops if on_cpu else None, work.tokens if counts.has_pictures else 0)
    before = f", about {duration_text(start)} before the first" if start else ""
    out += [f"time   about {duration_text(step)} a step on {where}{total}{before}", *start_notes(run, steps, start)]
    if work.base_kl:
        share = flops_per_step(work) / flops_per_step(replace(work, base_kl=0.0)) - 1
        room = whole - sum(memory(replace(work, base_kl_activations=0.0)).values())
        texts, every = amount(run.base_kl.texts, "text"), run.base_kl.every
        price = f"{share * every:.0%} more time in that step, {share:.0%} in all"
        out.append(f"base_kl  reads {texts} in one step of {every}: {price}, {room / GIB:.1f} GiB")
    return Costs(out, change)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Input of the estimates. `stage` is the ZeRO stage, 0 without DeepSpeed; FSDP2 shards what stage 3 shards."""

    total: int  # parameters of the base model
    adapters: int  # trained parameters in adapters
    anchors: int  # frozen copies of initial factors
    full: int  # parameters of modules that train in full
    fixed: int = 0  # numbers in the factors that never change, in float32
    packable: int = 0  # frozen parameters that quantisation packs
    packed_bytes: float | None = None  # per packed parameter; None: not quantised
    stage: int
    fsdp: Strategy | None = None
    devices: int
    records: int  # per device and micro-step
    tokens: int  # of one record, image tokens included
    supervised: int = 1  # tokens of a micro-step
    pictures: int = 0  # of a micro-step, where the tower reads them all at one size
    image_tokens: int = 0
    accumulation: int
    checkpointing: bool
    half: bool  # base and activations in 16 bits
    activations: float = 0.0  # peak bytes that a micro-step adds
    base_kl: float = 0.0  # tokens of the texts of `base_kl` that a step reads too, on average
    base_kl_activations: float = 0.0  # and the peak bytes that they add
    optimizer_bytes: float = 8.0  # per trained parameter: two moments of Adam; 2.0 with 8 bits
    offload_optimizer: bool = False
    offload_weights: bool = False

    @property
    def trained(self) -> int:
        return self.adapters + self.full

    @property
    def base_bytes(self) -> float:
        return 2.0 if self.half else 4.0


def _work_of(run: Run, counts: Counts, batching: Batching, *frugal: str) -> Workload:
    """Return the work of a run, also with the flags `frugal`.

    Texts and captions of `base_kl` take turns. A caption has its picture, and about 80 tokens of system text, question
    and answer. Records of earlier tasks are as long as this run's.
    """
    base, term, recipe = run.base, run.base_kl, run.recipe
    train = {**run.derived.train, **{RENAMED.get(name, name): True for name in frugal}}
    work = workload_of(train, run.launch, base, run.targets, counts, batching)
    if recipe.quantization != "none":
        work = replace(work, packed_bytes=bytes_per_number(recipe.quantization))
    saved = None if recipe.after is None else read_sidecar(Path(recipe.after))
    earlier = () if saved is None else saved.targets  # the base holds their factors
    held = sum((t.rank or 0) * (2 if t.has_anchor else 1) * sum(t.shape) for t in earlier)
    work = replace(work, fixed=work.fixed + held)
    if not term.weight:
        return work
    longest = of_text = max(LENGTH, work.tokens if recipe.after else 0)
    if base.reads_pictures and recipe.calibration.num_pictures and counts.has_pictures:
        largest = base.tokens_of_a_picture if base.tiling is None else base.tiling.most_tokens
        longest = max(longest, (largest or work.tokens) + 80)
    # In proportion; and logits and probabilities of the model and of the base in float32, with their gradients.
    in_proportion = work.activations * term.texts * longest / (work.records * work.tokens)
    extra = in_proportion + 5 * 4 * term.texts * of_text * base.config.get_text_config().vocab_size
    return replace(work, base_kl=term.texts * (LENGTH + longest) / 2 / term.every, base_kl_activations=extra)


def workload_of(
    train: Mapping[str, Any],
    launch: Launch,
    base: Base,
    targets: Sequence[Target],
    counts: Counts,
    batching: Batching,
) -> Workload:
    model, sizes = base.meta, trained_sizes(targets, base.meta)
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


def memory(work: Workload) -> dict[str, float]:
    """Return bytes per device, by purpose.

    DeepSpeed in bf16 keeps 16-bit trained weights and a float32 copy; FSDP2 trains float32 weights. With
    `shard_grad_op` it keeps all gathered weights from the forward to the backward.
    """
    share, grads, states = (work.devices if work.stage >= stage else 1 for stage in (3, 2, 1))
    narrow = 2 if work.stage and work.half and work.fsdp is None else 4
    master = 4 if narrow == 2 else 0
    gathered = work.total if work.fsdp == "shard_grad_op" else min(LIVE, work.total)
    on_device = not work.offload_optimizer
    # The optimizer step of DeepSpeed casts gradients to float32, after activations are freed; ZeRO-3 casts in parts.
    copies = master * min(work.trained / states, LIVE if work.stage == 3 else math.inf) * on_device
    activations = work.activations + work.base_kl_activations
    working = "activations" if activations >= copies else "float32 gradients at the step"
    sizes = {
        "frozen weights": frozen_weights(work) / share * (not work.offload_weights),
        "anchors (never sharded)": work.anchors * (work.base_bytes if work.packed_bytes is None else 4),
        "fixed factors": 4 * work.fixed,
        "trained weights": work.trained * narrow / share * (not work.offload_weights),
        "gradients": work.trained * narrow / grads,
        "buckets of DDP": work.trained * narrow * (work.stage == 0 and work.devices > 1),
        "optimizer": work.trained * (work.optimizer_bytes + master) / states * on_device,
        "gathered layers": gathered * work.base_bytes * (work.stage == 3 and work.devices > 1),
        working: max(activations, copies),
    }
    return {name: size for name, size in sizes.items() if size}


def frozen_weights(work: Workload) -> float:
    frozen = work.total if work.adapters else work.total - work.full
    packed = 0 if work.packed_bytes is None else work.packable
    return (frozen - packed) * work.base_bytes + packed * (work.packed_bytes or 0.0)


def host_memory(work: Workload) -> float:
    share, states = (work.devices if work.stage >= stage else 1 for stage in (3, 1))
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


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def needed(work: Workload) -> float:
    return sum(memory(work).values()) / GIB + OVERHEAD


def verdict(work: Workload, lean: Workload, flags: str, limit: float) -> tuple[list[str], str | None]:
    """Return lines for a device of `limit` GiB, and the flags that make it fit: "" if it fits, None if none do.

    `lean` is the workload with `flags`: half precision and checkpointing, if `work` lacks them.
    """
    held = sum(memory(work).values())
    if held >= 0.1 * GIB:  # rounded up: a number that would fit must not stand beside "does not fit"
        held = math.ceil(10 * held / GIB) / 10 * GIB
    summary = f"{limit:g} GiB: needs {size_text(held)} beside {OVERHEAD:g} GiB for CUDA"
    if needed(work) <= limit:
        return [f"fits   {summary}"], ""
    fitting = [(what, needed(other)) for what, other in memory_savings(work, lean, flags) if needed(other) <= limit]
    if not fitting:
        hint = "no single change is enough: use more devices, a smaller rank or a smaller model"
        return [f"does not fit {summary}", hint], None
    lines = [f"  {what}: {size:.1f} GiB" for what, size in fitting[:4]]
    return [f"does not fit {summary}", "these flags make it fit:", *lines], fitting[0][0]


def memory_savings(work: Workload, lean: Workload, flags: str) -> Iterator[tuple[str, Workload]]:
    """Yield flags to add to the command line and their workload, mildest first; each includes `flags`, as `lean`."""
    if flags:
        yield flags, lean
    smallest, least = lean, flags
    # Only divisors, so that the batch of a step stays the same.
    for records in (n for n in range(lean.records // 2, 0, -1) if lean.records % n == 0):
        less, accumulation = records / lean.records, lean.accumulation * lean.records // records
        batch = f"--per_device_train_batch_size {records} --gradient_accumulation_steps {accumulation}"
        smallest = replace(lean, records=records, accumulation=accumulation, activations=lean.activations * less)
        least = f"{flags} {batch}".lstrip()
        yield least, smallest
    if work.packed_bytes is not None:
        return
    if work.devices > 1 and work.stage < 3:
        yield f"--deepspeed zero3 {flags}".rstrip(), replace(lean, stage=3)
        yield f"--deepspeed zero3 {least}".rstrip(), replace(smallest, stage=3)
    if work.packable and work.stage < 3:
        packed = replace(smallest, packed_bytes=bytes_per_number("4bit"))
        yield f"--quantization 4bit {least}".rstrip(), packed
    if not work.offload_weights:
        offloaded = replace(smallest, stage=3, offload_weights=True, offload_optimizer=True)
        yield f"--deepspeed zero3_offload {least}".rstrip(), offloaded


def distinct_inputs(targets: Sequence[Target]) -> list[Target]:
    """Return one target with protected inputs for each input that several layers read: q, k, v, and gate, up."""
    found: dict[tuple[str, str], Target] = {}
    for target in targets:
        if target.protect:
            parent, _, leaf = target.path.rpartition(".")
            group = next((",".join(sorted(names)) for names in _SAME_INPUT if leaf in names), leaf)
            found.setdefault((parent, group), target)
    return list(found.values())


def part_of(count: int, steps: int) -> int:
    """Return how many of `count` texts, pictures or records calibrate a run: a tenth in a smoke test.

    >>> part_of(64, 9), part_of(64, 10)
    (7, 64)
    """
    return count if steps >= SMOKE_STEPS else -(-count // 10)


def start_seconds(run: Run, steps: int, flops: float | None, row: float) -> float:
    """Return about the seconds before the first step of a run of `steps` steps: on an A100, or at `flops` on a CPU.

    The base writes texts, describes pictures (`row` tokens; 0: there are none) and runs on both, and the inputs of the
    protected layers are decomposed. A caption has 112 tokens beside its picture, of which the base writes 32. An A100
    reads the weights in half precision once for each step of 16 texts. A CPU needs twice as long for a token that it
    writes as for one that it reads, and LAYER seconds for each layer of a forward, however small it is.

    Processes share the texts, captions, inputs and weights. Each pass over the calibration runs the model in all,
    and sums C of the inputs that fit beside it, and as much on what is held out; a pass ends at its last layer, so
    it runs half of the model on average. The eigenvalue solver makes C tridiagonal, which reads the rest of C once
    for each column: 4/3 n^3 bytes, limited by memory; the other steps are products with about 6 n^3 operations.
    """
    base, settings, size = run.base, run.recipe.calibration, num_parameters(run.base.meta)
    new = [target for target in run.targets if run.folder.checkpoint is None and run.recipe.adapter is None]
    layers = LAYER * base.config.get_text_config().num_hidden_layers
    if flops is None:
        token, written, products, bandwidth = 2 * size / A100_FLOPS, size / BANDWIDTH / 8, FLOAT32_FLOPS, BANDWIDTH
    else:
        token, written = 2 * size / flops + layers / TOKENS, 4 * size / flops + layers / COUNT
        products, bandwidth = flops, CPU_BANDWIDTH
    texts = captions = 0
    if run.reads_calibration:
        texts = part_of(settings.num_samples + HELD_OUT_TEXTS if settings.num_samples else 0, steps)
        captions = part_of(settings.num_pictures, steps) if base.reads_pictures and row else 0
    caption = (base.tokens_of_a_picture or min(row, 700)) + 112
    share = 1 / num_devices(run.request)
    seconds = share * (texts * LENGTH * written + captions * (caption * token + 32 * written))
    inputs = [float(target.shape[1]) for target in distinct_inputs(new)]
    if inputs:
        tokens = texts * LENGTH + captions * caption + part_of(NUM_RECORDS, steps) * len(run.tasks) * (row or LENGTH)
        free = psutil.virtual_memory().available if flops else max(A100_MEMORY - 2 * size, GIB)
        passes = math.ceil(share * 8 * sum(n**2 for n in inputs) / (ROOM * free))
        seconds += token * tokens * (passes + 1) / 2
        seconds += share * sum((n**2 * tokens + 6 * n**3) / products + 4 / 3 * n**3 / bandwidth for n in inputs)
    matrices = [target for target in new if target.is_decomposed]
    return seconds + share * DECOMPOSITION * sum(2.0 * math.prod(t.shape) * min(t.shape) for t in matrices) / products


def start_notes(run: Run, steps: int, start: float) -> list[str]:
    """Return what shortens a start, which takes `start` seconds, and that a smoke test calibrates with less."""
    if steps < SMOKE_STEPS and run.reads_calibration:
        return [SMOKE_NOTE]
    samples = run.recipe.calibration.num_samples
    if start < LONG_START or samples <= FEWER_SAMPLES:
        return []
    return [f"       --calibration_samples {FEWER_SAMPLES} shortens the start; later starts reuse it"]


def measured_flops(size: int = 1024, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
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


class _Ledger:
    """Counts the bytes of every storage when an operation allocates it and when it is freed, without gradients."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def count(self, tensor: Tensor) -> None:
        """Count the storage of a tensor that an operation returns, if it is new."""
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def release(self, size: int) -> None:
        self.live -= size

    def gradient(self, parameter: Tensor) -> None:
        """Leave out the gradient of a parameter, which stays until the step."""
        assert parameter.grad is not None
        self.live -= parameter.grad.untyped_storage().nbytes()


def activations(base: Base, targets: Sequence[Target], work: Workload) -> float:
    """Return the peak bytes of a micro-step: simulations of few layers, extrapolated to all layers.

    Both peaks grow linearly with the layers of each tower.
    """
    towers, text = find_towers(base.meta), base.config.get_text_config()
    depths = {"language": text.num_hidden_layers}
    if work.pictures:
        depths["vision"] = base.config.vision_config.num_hidden_layers

    def peaks(**layers: int) -> Tensor:
        small = copy.deepcopy(base.config)
        small.get_text_config().num_hidden_layers = layers["language"]
        if text.to_dict().get("layer_types"):
            small.get_text_config().layer_types = text.layer_types[: layers["language"]]
        if work.pictures:
            small.vision_config.num_hidden_layers = layers["vision"]
        kept = [t for t in targets if (towers.block_of(t.path) or 0) < layers.get(str(t.tower), FEW[1])]
        return torch.tensor(simulate(small, kept, work))

    few = {tower: min(FEW[1], depth) for tower, depth in depths.items()}
    most = whole = peaks(**few)
    for tower, depth in depths.items():
        if depth > few[tower]:
            whole = whole + (most - peaks(**few | {tower: FEW[0]})) * (depth - few[tower])
    return float(whole.max())


def simulate(config: Any, targets: Sequence[Target], work: Workload) -> tuple[int, int]:
    """Run a forward and a backward pass of the model of `config` with the targets, without data.

    Returns the bytes that the pass adds at its peak: before the language model, and from there on.
    """
    dtype = torch.bfloat16 if work.half else torch.float32
    auto = AutoModelForImageTextToText if "vision_config" in config.to_dict() else AutoModelForCausalLM
    with torch.device("meta"):
        base = auto.from_config(config, attn_implementation="sdpa", dtype=dtype)
        model = _adapted(base, targets)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with without_data(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to_empty(device="cpu")
        ledger = _Ledger()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(ledger.gradient)
        model.train()
        if work.checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.seen[tensor.untyped_storage()] = 0  # resident, not part of the step
        with after_operations(ledger.count):
            with torch.autocast("cpu", torch.bfloat16, enabled=work.half):
                embeds = _embeddings(base, work, dtype)
                of_pictures, ledger.peak = ledger.peak, ledger.live
                loss = _loss(base, embeds, work)
            del embeds
            loss.backward()
    return of_pictures, ledger.peak


def _adapted(base: nn.Module, targets: Sequence[Target]) -> nn.Module:
    """Return the model as in training: adapters are installed, the other targets train in full."""
    base.requires_grad_(False)
    with_adapters = [target for target in targets if target.rank is not None]
    if not with_adapters:
        for target in targets:
            base.get_submodule(target.path).requires_grad_(True)
        return base
    model = make_lora(base, targets)
    for target in with_adapters:
        layer = lora_layer(model, target.path)
        set_dropout(layer, "default", target.dropout)
        if target.has_fixed_A:
            fix_A(layer, "default")
        elif target.has_anchor:
            dtype, rank = factor_dtype(layer.get_base_layer()), target.rank or 0
            A0 = torch.empty(rank, target.shape[1], dtype=dtype)
            B0 = torch.empty(target.shape[0], rank, dtype=dtype)
            install_factors(layer, "default", A0, B0)
    return model


def _embeddings(base: Any, work: Workload, dtype: torch.dtype) -> Tensor:
    """Return the input of the language model: embeddings plus image features, whose positions do not matter."""
    embeds: Tensor = base.get_input_embeddings()(torch.zeros(work.records, work.tokens, dtype=torch.long))
    if work.checkpointing:
        embeds.requires_grad_(True)
    if not work.pictures:
        return embeds
    vision, towers = base.config.vision_config, find_towers(base)
    pixels = torch.zeros(work.pictures, 3, vision.image_size, vision.image_size, dtype=dtype)
    states = base.get_submodule(towers.vision)(pixels, output_hidden_states=True).hidden_states
    num_layers = len(layers_of(base.config))  # their features are joined, and all layers have the same shape
    features = torch.cat([states[-1][:, : work.image_tokens]] * num_layers, dim=-1)
    features = base.get_submodule(towers.projector)(features).flatten(0, 1).to(embeds.dtype)
    rows = torch.zeros(min(len(features), embeds.shape[0] * embeds.shape[1]), dtype=torch.long)
    return embeds.flatten(0, 1).index_add(0, rows, features[: len(rows)]).view_as(embeds)


def _loss(base: Any, embeds: Tensor, work: Workload) -> Tensor:
    text = base.config.get_text_config().to_dict()
    width = text.get("hidden_size_per_layer_input")  # Gemma 4 has embeddings of the ids in each layer
    language: Any = base.get_submodule(find_towers(base).language) if work.pictures or width else inner_model(base)
    inputs = {"inputs_embeds": embeds}
    if width:
        inputs["per_layer_inputs"] = embeds.new_zeros(*embeds.shape[:2], text["num_hidden_layers"], width)
    hidden = language(**inputs, use_cache=False)[0].flatten(0, 1)
    count = max(min(work.supervised, len(hidden)), 1)
    targets = torch.zeros(count, dtype=torch.long).split(max(CHUNK // text["vocab_size"], 1))
    head = base.get_output_embeddings()
    trained = [p for p in head.parameters() if p.requires_grad]
    loss: Tensor = GradientsAtOnce.apply(head, hidden[:count], targets, *trained)
    return loss
