"""Measure the memory of a training step, above all activations, by running it without data (torch's fake tensors).

It counts every storage when an operation allocates it and when it is freed. So the memory kept for the backward pass,
with or without checkpointing and autocast, is measured instead of computed by a formula.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from milora_vl.common.compat.torch import after_operations, without_data
from milora_vl.core.adapter.anchored import fixed_names, install_factors
from milora_vl.core.adapter.fixed_a import fix_A
from milora_vl.core.adapter.lora import lora_layer, make_lora, set_dropout
from milora_vl.core.policy import Target
from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.matrices import factor_dtype
from milora_vl.models.image_tokens import layers_of
from milora_vl.models.losses import CHUNK, GradientsAtOnce, inner_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one device computes in one micro-step. `supervised` counts labelled positions over all records."""

    records: int
    tokens: int  # of one record, image tokens included
    supervised: int
    pictures: int
    image_tokens: int
    half: bool  # bf16 autocast
    checkpointing: bool
    base_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes that stay between steps, without the optimizer, and the peak that a step adds."""

    frozen: int
    anchors: int  # and factors that never change
    trained: int
    pictures: int  # peak before the language model, without gradients
    language: int  # peak from there on
    with_gradients: int  # peak with the gradients allocated so far

    @property
    def activations(self) -> int:
        """Return the peak without gradients."""
        return max(self.pictures, self.language)


class _Ledger:
    """Counts live bytes and their peak."""

    def __init__(self) -> None:
        self.live = self.gradients = 0
        self.peak = self.peak_with_gradients = self.peak_of_pictures = 0
        self.seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def count(self, tensor: Tensor) -> None:
        """Count the storage of a tensor that an operation returns, if it is new."""
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen[storage] = size
            self.live += size
            weakref.finalize(storage, self.release, size)
        self.note()

    def release(self, size: int) -> None:
        """Subtract a freed storage."""
        self.live -= size

    def note(self) -> None:
        """Update the peaks."""
        self.peak = max(self.peak, self.live - self.gradients)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live)

    def begin_language(self) -> None:
        """Note the peak so far, and begin another one."""
        self.peak_of_pictures, self.peak = self.peak, self.live - self.gradients

    def gradient(self, parameter: Tensor) -> None:
        """Count a complete gradient, which is not an activation."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()


def simulate(config: Any, targets: Sequence[Target], shape: Shape) -> Resident:
    """Run one forward and backward pass of the model of `config` with the targets, without data."""
    with torch.device("meta"):
        base = _model(config, shape.base_dtype)
        model = _adapted(base, targets)
    with without_data(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _onto_cpu(model)
        anchors = sum(_size(model.get_buffer(name)) for name in fixed_names(model))
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = sum(_size(p) for p in model.parameters() if not p.requires_grad)
        ledger = _Ledger()
        hooks = [p.register_post_accumulate_grad_hook(ledger.gradient) for p in trained]
        model.train()
        if shape.checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.seen[tensor.untyped_storage()] = 0  # resident, not part of the step
        autocast = torch.autocast("cpu", torch.bfloat16) if shape.half else nullcontext()
        with _flash_attention(), after_operations(ledger.count):
            with autocast:
                loss = _loss(base, shape, ledger.begin_language)
            loss.backward()
        del hooks
    peaks = ledger.peak_of_pictures, ledger.peak, ledger.peak_with_gradients
    return Resident(frozen, anchors, sum(map(_size, trained)), *peaks)


def _model(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if "vision_config" in config.to_dict() else AutoModelForCausalLM
    return auto.from_config(config, attn_implementation="sdpa", dtype=dtype)


def _adapted(base: nn.Module, targets: Sequence[Target]) -> nn.Module:
    """Return the model as in training: anchored adapters are installed, and trained weights are float32."""
    model: nn.Module = base
    base.requires_grad_(False)
    if any(target.rank is not None for target in targets):
        tuned = make_lora(base, targets)
        for target in (t for t in targets if t.rank is not None):
            layer = lora_layer(tuned, target.path)
            set_dropout(layer, "default", target.dropout)
            if target.has_fixed_A:
                fix_A(layer, "default")
            elif target.has_anchor:
                dtype, rank = factor_dtype(layer.get_base_layer()), target.rank or 0
                A0 = torch.empty(rank, target.shape[1], dtype=dtype)
                B0 = torch.empty(target.shape[0], rank, dtype=dtype)
                install_factors(layer, "default", A0, B0)
        model = tuned
    else:
        for target in targets:
            base.get_submodule(target.path).requires_grad_(True)
    return model


def _onto_cpu(model: nn.Module) -> None:
    """Move every weight to the CPU, without data; trained weights become float32. Tied weights stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in moved:
                dtype = torch.float32 if old.requires_grad else old.dtype
                moved[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=dtype), requires_grad=old.requires_grad)
            module.register_parameter(name, moved[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _loss(base: Any, shape: Shape, begin_language: Callable[[], None]) -> Tensor:
    inner = inner_model(base)
    text = base.config.get_text_config().to_dict()
    width = text.get("hidden_size_per_layer_input")  # Gemma 4 has embeddings of the ids in each layer
    language = base.get_submodule(find_towers(base).language) if shape.pictures or width else inner
    assert language is not None
    ids = torch.zeros(shape.records, shape.tokens, dtype=torch.long)
    embeds = base.get_input_embeddings()(ids)
    if shape.checkpointing:
        embeds.requires_grad_(True)
    if shape.pictures:
        embeds = _with_pictures(base, embeds, shape)
    inputs = {"inputs_embeds": embeds}
    if width:
        inputs["per_layer_inputs"] = embeds.new_zeros(*ids.shape, text["num_hidden_layers"], width)
    begin_language()
    hidden = language(**inputs, use_cache=False)[0].flatten(0, 1)
    head = base.get_output_embeddings()
    piece = max(CHUNK // base.config.get_text_config().vocab_size, 1)
    count = max(min(shape.supervised, shape.records * shape.tokens), 1)
    targets = torch.zeros(count, dtype=torch.long).split(piece)
    rest = [p for p in head.parameters() if p.requires_grad]
    total: Tensor = GradientsAtOnce.apply(head, hidden[:count], targets, *rest)
    return total


def _with_pictures(base: Any, embeds: Tensor, shape: Shape) -> Tensor:
    """Return the embeddings plus image features; their positions do not matter for memory."""
    vision = base.config.vision_config
    pixels = torch.zeros(shape.pictures, 3, vision.image_size, vision.image_size, dtype=shape.base_dtype)
    towers = find_towers(base)
    tower, projector = (base.get_submodule(path) for path in (towers.vision, towers.projector))
    states = tower(pixels, output_hidden_states=True).hidden_states
    num_layers = len(layers_of(base.config))  # their features are joined, and all layers have the same shape
    features = torch.cat([states[-1][:, : shape.image_tokens]] * num_layers, dim=-1)
    features = projector(features).flatten(0, 1).to(embeds.dtype)
    flat = embeds.flatten(0, 1)
    rows = torch.zeros(min(len(features), len(flat)), dtype=torch.long)
    return flat.index_add(0, rows, features[: len(rows)]).view_as(embeds)


class _Flash(torch.autograd.Function):
    """Attention that saves what fused kernels save: queries, keys, values, result and one number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return an empty result; all shapes are (batch, heads, length, width)."""
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return empty gradients of query, key and value."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _flash_attention() -> Iterator[None]:
    original = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return _Flash.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
