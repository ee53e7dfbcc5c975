"""Memory per device and time of a plan: how much is needed, whether it fits, and which flags make it fit.

The plan of a run shows them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from milora_vl.common.cli.command_line import amount
from milora_vl.core.calibration.texts import HELD_OUT_TEXTS, LENGTH
from milora_vl.core.policy import Target
from milora_vl.core.policy.towers import find_towers
from milora_vl.models.base import Base
from milora_vl.models.quantized import bytes_per_number, quantized_layers
from milora_vl.train.dry_run.estimate import (
    A100_FLOPS,
    GIB,
    SMOKE_NOTE,
    SMOKE_STEPS,
    Workload,
    distinct_inputs,
    duration_text,
    expected_directions,
    flops_per_step,
    host_memory,
    measured_flops,
    memory,
    part_of,
    planned_pace,
    size_text,
    start_lines,
    start_seconds,
)
from milora_vl.train.dry_run.first_batch import Counts
from milora_vl.train.dry_run.simulate import Resident, Shape, simulate
from milora_vl.train.plan.batching import Batching
from milora_vl.train.plan.earlier_tasks import NUM_RECORDS, num_held
from milora_vl.train.plan.launch import strategy_of
from milora_vl.train.plan.plan import Plan
from milora_vl.train.plan.screen import trained_sizes
from milora_vl.train.plan.train_section import TrainSection

A100, CPU = "one A100 per device at 40 % of peak", "the CPU of this machine"
MIX665K = Counts(tokens=700, supervised=60, exact=False)  # approximate, per record
FEW = (2, 3)  # numbers of simulated layers; each further layer adds what the third added


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a run as lines to print, and the flags that make it fit: "" if it fits, None if no flags help.

    `step_flops` are the operations of a step, `start` the planned seconds before the first one: on A100, and on CPU in
    a plan for this machine.
    """

    lines: list[str]
    change: str | None = ""
    step_flops: float = 0.0
    start: Mapping[str, float] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Return whether the run fits --gpu-memory without changes."""
        return self.change == ""


def costs_of(plan: Plan, counts: Counts, batching: Batching, *, has_steps: bool) -> Costs:
    """Return memory by purpose and the time of a run; a plan for this machine has its time on the CPU, too."""
    section, base, recipe, request = plan.section, plan.base, plan.recipe, plan.settings.request
    packed_bytes = None
    if recipe.quantization != "none":
        packed_bytes = bytes_per_number(recipe.quantization, double_quant=recipe.double_quant)
    base_kl = base_kl_tokens(plan, counts)
    held = num_held(recipe)
    work = workload_of(section, base, plan.targets, counts, batching, packed_bytes, base_kl, held)
    missing = {"bf16": not work.half, "activation_checkpointing": not work.checkpointing}
    frugal = {name: True for name, lacks in missing.items() if lacks}
    flags = " ".join(f"--{name.replace('activation', 'gradient')} True" for name in frugal)
    lean = work
    if frugal:
        leaner = replace(section, arguments=section.arguments | frugal)
        lean = workload_of(leaner, base, plan.targets, counts, batching, packed_bytes, base_kl, held)
    sizes, leanest = memory(work), sum(memory(lean).values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size >= 0.05 * GIB)
    stage = "FSDP2" if work.fsdp else f"ZeRO-{work.stage}" if work.stage else "no ZeRO"
    devices = f"{work.devices} device{'s' if work.devices > 1 else ''}"
    whole = f"memory about {size_text(sum(sizes.values()))} per device ({stage}, {devices})"
    out = [f"{whole}: {parts}" if parts else whole]
    if base.own_pictures:
        out.append("       and the activations of the vision tower, which depend on the sizes of the pictures")
    if host_memory(work):
        out.append(f"       and {host_memory(work) / GIB:.1f} GiB of host memory per device (offloaded)")
    if leanest < min(0.9 * sum(sizes.values()), sum(sizes.values()) - 0.05 * GIB):
        out.append(f"       with {flags} about {leanest / GIB:.1f} GiB")
    change: str | None = ""
    if request.gpu_memory is not None:
        lines, change = verdict(work, lean, flags, request.gpu_memory)
        out += lines
    step, rates = flops_per_step(work), {A100: A100_FLOPS}
    if request.devices is None and request.gpu_memory is None:
        rates[CPU] = measured_flops()
    for name, rate in rates.items():
        total = f", {duration_text(batching.steps * step / rate)} in total" if has_steps else ""
        out.append(f"time   about {duration_text(step / rate)} a step on {name}{total}")
    if work.base_kl:
        share = step / flops_per_step(replace(work, base_kl=0.0)) - 1
        texts, every = amount(plan.base_kl.texts, "text"), plan.base_kl.every
        price = f"{share * every:.0%} more time in that step, {share:.0%} in all"
        room = sum(sizes.values()) - sum(memory(replace(work, base_kl_activations=0.0)).values())
        out.append(f"base_kl  reads {texts} in one step of {every}: {price}, {room / GIB:.1f} GiB")
    chosen = plan.targets if recipe.adapter is None else ()  # the A of an adapter is known
    inputs = distinct_inputs(chosen)
    if inputs:
        share = sum(map(expected_directions, inputs)) / sum(target.shape[1] for target in inputs)
        out.append(f"inputs  about {share:.0%} of the input directions protected (the calibration finds how many)")
    settings, steps = recipe.calibration, batching.steps if has_steps else SMOKE_STEPS
    reads_texts = bool(inputs or plan.base_kl.weight)
    captions = part_of(settings.num_pictures, steps) if base.reads_pictures and counts.has_pictures else 0
    samples = settings.num_samples + HELD_OUT_TEXTS if settings.num_samples else 0
    start: dict[str, float] = {}
    for name, rate in rates.items():
        seconds = start_seconds(
            planned_pace(base.meta, None if rate == A100_FLOPS else rate),
            inputs,
            texts=part_of(samples, steps) * reads_texts,
            captions=captions * reads_texts,
            picture_tokens=base.tokens_of_a_picture or min(work.tokens, 700),
            decomposed=[target for target in chosen if target.is_decomposed],
            earlier_tokens=part_of(NUM_RECORDS, steps) * len(plan.tasks) * work.tokens,
        )
        start[name] = sum(seconds.values())
        if seconds:
            if steps < SMOKE_STEPS and SMOKE_NOTE not in out:
                out.append(SMOKE_NOTE)
            out += start_lines(seconds, name)[: 1 if rate == A100_FLOPS else None]
    return Costs(out, change, step, start)


def activations(base: Base, targets: Sequence[Target], shape: Shape) -> float:
    """Return the peak bytes of a micro-step: simulations of few layers, extrapolated to all layers.

    The peak of the language model grows linearly with its layers, and the peak before it with those of a frozen vision
    tower. A vision tower that trains is simulated whole.
    """
    config, towers = base.config, find_towers(base.meta)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    tower = config.to_dict().get("vision_config", {}).get("num_hidden_layers", 0) if shape.pictures else 0
    shortens_tower = tower > FEW[1] and not any(target.tower == "vision" for target in targets)

    def run(language: int, vision: int) -> Resident:
        small = copy.deepcopy(config)
        small.get_text_config().num_hidden_layers = language
        if small.get_text_config().to_dict().get("layer_types"):
            small.get_text_config().layer_types = text.layer_types[:language]
        if shortens_tower:
            small.vision_config.num_hidden_layers = vision
        kept = [t for t in targets if t.tower != "language" or (towers.block_of(t.path) or 0) < language]
        return simulate(small, kept, shape)

    fewer, few = (min(count, layers) for count in FEW)
    most = run(few, FEW[1])
    of_language = most.language + (most.language - run(fewer, FEW[1]).language) * (layers - FEW[1])
    of_pictures = most.pictures
    if shortens_tower:
        of_pictures += (most.pictures - run(few, FEW[0]).pictures) * (tower - FEW[1])
    return max(of_language, of_pictures)


def shape_of(base: Base, work: Workload, counts: Counts) -> Shape:
    """Return the shape of one micro-step on one device."""
    # Elsewhere the size of a picture decides what the tower computes; `tokens` includes the tokens of pictures.
    return Shape(
        records=work.records,
        tokens=max(work.tokens, 2),
        supervised=int(counts.supervised * work.records),
        pictures=math.ceil(work.records * counts.records) if base.kind == "llava" else 0,
        image_tokens=base.tokens_of_a_picture,
        half=work.half,
        checkpointing=work.checkpointing,
        base_dtype=torch.bfloat16 if work.half else torch.float32,
    )


def workload_of(
    section: TrainSection,
    base: Base,
    targets: Sequence[Target],
    counts: Counts,
    batching: Batching,
    packed_bytes: float | None,
    base_kl: tuple[float, int, int] = (0.0, 0, 0),
    held: int = 0,
) -> Workload:
    """Return the workload of a run: resident memory is counted, the memory of a step is simulated.

    `packed_bytes` is the bytes per parameter of a quantised base; None if the base is not quantised. `base_kl` has the
    `base_kl_tokens`, `held` the numbers in the update of earlier runs.
    """
    train, launch, model = section.arguments, section.launch, base.meta
    sizes = trained_sizes(targets, model)
    adapters = sum(sizes[t.path] for t in targets if t.rank is not None)
    half = bool(train.get("bf16") or train.get("fp16"))
    zero = (launch.deepspeed or {}).get("zero_optimization", {})
    fsdp = None if launch.fsdp is None else strategy_of(launch.fsdp)
    work = Workload(
        total=_numel(model),
        adapters=adapters,
        anchors=sum(sizes[t.path] for t in targets if t.has_anchor),
        full=sum(sizes.values()) - adapters,
        fixed=sum((t.rank or 0) * t.shape[1] for t in targets if t.has_fixed_A) + held,
        base_bytes=2.0 if half else 4.0,
        packable=0 if not adapters else sum(_numel(model.get_submodule(path)) for path in quantized_layers(model)),
        packed_bytes=packed_bytes,
        stage=3 if fsdp else launch.zero_stage,
        fsdp=fsdp,
        devices=batching.num_devices,
        records=batching.per_device,
        tokens=int(counts.tokens),
        accumulation=batching.accumulation,
        checkpointing=bool(train.get("activation_checkpointing")),
        half=half,
        activations=0.0,
        base_kl=base_kl[0],
        optimizer_bytes=2.0 if "8bit" in str(train.get("optim", "")) else 8.0,
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_weights=_offloads(zero, "offload_param"),
    )
    shape = shape_of(base, work, counts)
    step = activations(base, targets, shape)
    if fsdp:  # its loss keeps the logits of the supervised positions in float32, and their gradients
        step += 2 * 4 * shape.supervised * base.config.get_text_config().vocab_size
    # In proportion; and logits and probabilities of the model and of the base in float32, with their gradients.
    extra = (
        step * base_kl[1] / (shape.records * shape.tokens)
        + 5 * 4 * base_kl[2] * base.config.get_text_config().vocab_size
    )
    return replace(work, activations=step, base_kl_activations=extra)


def base_kl_tokens(plan: Plan, counts: Counts) -> tuple[float, int, int]:
    """Return the tokens that `base_kl` reads in a step, on average over all steps and at most, and those with logits.

    Texts and captions take turns. A caption has its picture, and about 80 tokens of system text, question and answer.
    Records of earlier tasks are as long as this run's.
    """
    recipe, base, texts, every = plan.recipe, plan.base, plan.base_kl.texts, plan.base_kl.every
    if not plan.base_kl.weight:
        return 0.0, 0, 0
    longest = of_text = LENGTH
    if base.reads_pictures and recipe.calibration.num_pictures and counts.has_pictures:
        largest = base.tokens_of_a_picture if base.tiling is None else base.tiling.most_tokens
        longest = max(LENGTH, (largest or int(counts.tokens)) + 80)
    if recipe.after:
        longest, of_text = max(longest, int(counts.tokens)), max(of_text, int(counts.tokens))
    return texts * (LENGTH + longest) / 2 / every, texts * longest, texts * of_text


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") != "none"


OVERHEAD = 1.0  # GiB for CUDA, its libraries and fragmentation


def needed(work: Workload) -> float:
    """Return the GiB on one device, including CUDA."""
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
    # Only divisors, so that the batch of a step stays the same.
    for records in (n for n in range(lean.records // 2, 0, -1) if lean.records % n == 0):
        yield f"{flags} {_batch(lean, records)}".lstrip(), _with_batch(lean, records)
    smallest = _with_batch(lean, 1)
    least = f"{flags} {_batch(lean, 1)}".lstrip() if lean.records > 1 else flags
    if work.devices > 1 and work.stage < 3 and work.packed_bytes is None:
        yield f"--deepspeed zero3 {flags}".rstrip(), replace(lean, stage=3)
        yield f"--deepspeed zero3 {least}".rstrip(), replace(smallest, stage=3)
    if work.packable and work.packed_bytes is None and work.stage < 3:
        packed = replace(smallest, packed_bytes=bytes_per_number("4bit", double_quant=True))
        yield f"--quantization 4bit {least}".rstrip(), packed
    if not work.offload_weights and work.packed_bytes is None:
        offloaded = replace(smallest, stage=3, offload_weights=True, offload_optimizer=True)
        yield f"--deepspeed zero3_offload {least}".rstrip(), offloaded


def _batch(work: Workload, records: int) -> str:
    accumulation = work.accumulation * work.records // records
    return f"--per_device_train_batch_size {records} --gradient_accumulation_steps {accumulation}"


def _with_batch(work: Workload, records: int) -> Workload:
    accumulation = work.accumulation * work.records // records
    return replace(work, records=records, accumulation=accumulation,
                   activations=work.activations * records / work.records)  # fmt: skip
