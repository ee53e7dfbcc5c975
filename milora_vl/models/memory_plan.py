"""The plan of memory: what a step of a model needs per device, by purpose, and the flags with which it fits.

Weights, gradients and optimizer follow the accounting of ZeRO (arXiv:1910.02054): 16 bytes per trained parameter,
sharded by stage. What a step adds, above all activations, is measured by running it without data (torch's fake
tensors): every storage is counted when an operation allocates it and when it is freed, with or without checkpointing
and autocast.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from milora_vl.common.compat.torch import after_operations, without_data
from milora_vl.core.adapter.anchored import install_factors
from milora_vl.core.adapter.fixed_a import fix_A
from milora_vl.core.adapter.lora import lora_layer, make_lora, set_dropout
from milora_vl.core.policy import Target
from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.matrices import factor_dtype
from milora_vl.models.base import Base
from milora_vl.models.devices import bytes_per_number
from milora_vl.models.llava import layers_of
from milora_vl.models.losses import CHUNK, GradientsAtOnce, inner_model

GIB = 1024**3
OVERHEAD = 1.0  # GiB for CUDA, its libraries and fragmentation
FEW = (2, 3)  # numbers of simulated layers; each further layer adds what the third added
LIVE = 1_000_000_000  # stage3_max_live_parameters, sub_group_size: parameters gathered, or stepped, at once


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
    fsdp: Literal["full_shard", "shard_grad_op"] | None = None
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


def needed(work: Workload) -> float:
    """Return the GiB of a device: of a step or, with FSDP2, of the whole model beside its shard, at the start's end."""
    whole = (frozen_weights(work) + 4 * work.trained) * (1 + 1 / work.devices) * (work.fsdp is not None)
    return max(sum(memory(work).values()), whole) / GIB + OVERHEAD


def verdict(work: Workload, lean: Workload, flags: str, limit: float) -> tuple[list[str], bool]:
    """Return lines for a device of `limit` GiB, with flags that make it fit, and whether it fits.

    `lean` is the workload with `flags`: half precision and checkpointing, if `work` lacks them.
    """
    held = GIB * (needed(work) - OVERHEAD)
    when = "for the start " if held > sum(memory(work).values()) + GIB / 2 else ""
    if held >= 0.1 * GIB:  # rounded up: a number that would fit must not stand beside "does not fit"
        held = math.ceil(10 * held / GIB) / 10 * GIB
    summary = f"{limit:g} GiB: needs {size_text(held)} {when}beside {OVERHEAD:g} GiB for CUDA"
    if needed(work) <= limit:
        return [f"fits   {summary}"], True
    fitting = [(what, needed(other)) for what, other in memory_savings(work, lean, flags) if needed(other) <= limit]
    if not fitting:
        hint = "no single change is enough: use more devices, a smaller rank or a smaller model"
        return [f"does not fit {summary}", hint], False
    lines = [f"  {what}: {size:.1f} GiB" for what, size in fitting[:4]]
    return [f"does not fit {summary}", "these flags make it fit:", *lines], False


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
    zero3 = '--fsdp "" --deepspeed zero3' if work.fsdp else "--deepspeed zero3"
    if work.devices > 1 and (work.stage < 3 or work.fsdp):
        yield f"{zero3} {flags}".rstrip(), replace(lean, stage=3, fsdp=None)
        yield f"{zero3} {least}".rstrip(), replace(smallest, stage=3, fsdp=None)
    if work.packable and work.stage < 3:
        packed = replace(smallest, packed_bytes=bytes_per_number("4bit"))
        yield f"--quantization 4bit {least}".rstrip(), packed
    if not work.offload_weights:
        offloaded = replace(smallest, stage=3, fsdp=None, offload_weights=True, offload_optimizer=True)
        yield f"{zero3}_offload {least}".rstrip(), offloaded


def size_text(size: float) -> str:
    """Return a number of bytes as text.

    >>> size_text(3 * GIB), size_text(6_000_000)
    ('3.0 GiB', '6 MiB')
    """
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{math.ceil(size / 1024**2)} MiB"


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
    towers, text = base.towers, base.config.get_text_config()
    depths = {"language": text.num_hidden_layers}
    if work.pictures and "num_hidden_layers" in base.config.vision_config.to_dict():  # timm's towers have other names
        depths["vision"] = base.config.vision_config.num_hidden_layers

    def peaks(**layers: int) -> Tensor:
        small = copy.deepcopy(base.config)
        small.get_text_config().num_hidden_layers = layers["language"]
        if text.to_dict().get("layer_types"):
            small.get_text_config().layer_types = text.layer_types[: layers["language"]]
        if "vision" in layers:
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
