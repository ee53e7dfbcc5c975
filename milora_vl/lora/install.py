"""Put the two halves into the layers that PEFT made, and find them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from milora_vl.lora.layers import (
    ANCHOR,
    ANCHOR_SUFFIX,
    TRAINED,
    Conv2dA,
    Conv2dB,
    EmbeddingHalves,
    Halves,
    LinearA,
    LinearB,
    join,
    lossless,
    split,
)
from milora_vl.weights.matrices import factor_dtype

_KINDS: dict[type[nn.Module], tuple[type[Halves], type[Halves]]] = {
    nn.Linear: (LinearA, LinearB),
    nn.Conv2d: (Conv2dA, Conv2dB),
}


def lora_layer(model: PeftModel, path: str) -> LoraLayer:
    """Return PEFT's layer at a path of the base model."""
    layer = model.get_base_model().get_submodule(path)
    assert isinstance(layer, LoraLayer), f"{path} is a {type(layer).__name__}"
    return layer


def base_layer(model: nn.Module, path: str) -> nn.Module:
    """Return the layer of the base model at `path`, below PEFT's where there is one."""
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    layer = root.get_submodule(path)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def set_dropout(layer: LoraLayer, adapter: str, probability: float) -> None:
    """Set the dropout of one adapter of one layer: PEFT's config has one value for all."""
    was_training = layer.lora_dropout.training
    layer.lora_dropout[adapter] = nn.Dropout(probability) if probability > 0 else nn.Identity()
    layer.lora_dropout.train(was_training)


def install(layer: LoraLayer, adapter: str, A0: Tensor, B0: Tensor) -> None:
    """Start adapter `adapter` of a layer at the anchor A0 (r, in), B0 (out, r): both halves hold these values."""
    halves = []
    for axis, (anchor, stock) in enumerate(zip((A0, B0), factors(layer, adapter), strict=True)):
        shape = list(stock.shape)  # of a convolution: (2r, in, kh, kw) and (out, 2r, 1, 1)
        shape[axis] //= 2
        anchor = anchor.to(stock.device).reshape(shape).contiguous()
        halves.append((anchor.to(stock.dtype, copy=True), anchor))
    _put(layer, adapter, halves)


def install_loaded(layer: LoraLayer, adapter: str) -> None:
    """Turn a stock factor pair just loaded, [A; A0] and [B, -B0], into halves; the anchor in the base's dtype."""
    dtype = factor_dtype(layer.get_base_layer())
    pairs = [split(joined, axis) for axis, joined in enumerate(factors(layer, adapter))]
    _put(layer, adapter, [(trained, lossless(anchor, dtype)) for trained, anchor in pairs])


def install_copy(layer: LoraLayer, adapter: str, source: str) -> None:
    """Give adapter `adapter` the anchor of `source`, its trained halves starting there."""
    dtypes = [factor.dtype for factor in factors(layer, adapter)]
    anchors = [anchor.clone() for anchor in anchors_of(layer, source)]
    _put(layer, adapter, [(a.to(dtype, copy=True), a) for a, dtype in zip(anchors, dtypes, strict=True)])


def _put(layer: LoraLayer, adapter: str, halves: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Replace the stock factors of `adapter` by (trained, anchor) for A and for B."""
    if adapter in layer.lora_embedding_A:
        for axis, holder in enumerate((layer.lora_embedding_A, layer.lora_embedding_B)):
            ours = holder if isinstance(holder, EmbeddingHalves) else EmbeddingHalves.take_over(holder, axis)
            ours.set_halves(adapter, *halves[axis])
        return
    for axis, stock in enumerate((layer.lora_A[adapter], layer.lora_B[adapter])):
        _KINDS[type(stock)][axis].take_over(stock, *halves[axis])


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the factors of an adapter as stock PEFT has them: A' (2r, in) and B' (out, 2r)."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    if isinstance(first, Halves) and isinstance(second, Halves):
        return first.joined, second.joined
    return first.get_parameter("weight"), second.get_parameter("weight")


def trained_factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return what trains of an adapter: A (r, in) and B (out, r), of a convolution (r, in, kh, kw), (out, r, 1, 1)."""
    if adapter in layer.lora_embedding_A:
        holders = (layer.lora_embedding_A, layer.lora_embedding_B)
        return holders[0].get_parameter(adapter), holders[1].get_parameter(adapter)
    pair = (layer.lora_A[adapter], layer.lora_B[adapter])
    A, B = (half.get_parameter(TRAINED if isinstance(half, Halves) else "weight") for half in pair)
    return A, B


def anchors_of(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A0 and B0 of an adapter in halves."""
    return _anchor(layer, adapter, 0), _anchor(layer, adapter, 1)


def _anchor(layer: LoraLayer, adapter: str, axis: int) -> Tensor:
    if adapter in layer.lora_embedding_A:
        holder = (layer.lora_embedding_A, layer.lora_embedding_B)[axis]
        assert isinstance(holder, EmbeddingHalves)
        anchor = holder.anchor_of(adapter)
        assert anchor is not None
        return anchor
    half = (layer.lora_A, layer.lora_B)[axis][adapter]
    assert isinstance(half, Halves)
    return half.anchor


def has_halves(layer: LoraLayer, adapter: str) -> bool:
    """Tell whether `adapter` of this layer has a trained half and an anchor."""
    if adapter in layer.lora_A:
        return isinstance(layer.lora_A[adapter], Halves)
    holder = layer.lora_embedding_A
    return isinstance(holder, EmbeddingHalves) and adapter in holder and holder.anchor_of(adapter) is not None


def anchor_names(model: nn.Module) -> Iterator[str]:
    """Yield the names of all anchor buffers of a model."""
    for name, module in model.named_modules():
        if isinstance(module, Halves):
            yield f"{name}.{ANCHOR}"
        elif isinstance(module, EmbeddingHalves):
            yield from (f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False))


def joined_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the raw names of halves in a gathered state dict (ZeRO-3, FSDP1) under their stock names.

    `...lora_A.default.trained` and `.anchor` become `...lora_A.default.weight`; all else stays as it is.

    >>> import torch
    >>> raw = {"l.lora_A.x.trained": torch.ones(1, 2), "l.lora_A.x.anchor": torch.zeros(1, 2)}
    >>> {name: tuple(t.shape) for name, t in joined_state(raw).items()}
    {'l.lora_A.x.weight': (2, 2)}
    """
    out = dict(state)
    for key in state:
        prefix, _, name = key.rpartition(".")
        if name == TRAINED and f"{prefix}.{ANCHOR}" in state:
            stock, anchor_key, axis = f"{prefix}.weight", f"{prefix}.{ANCHOR}", int(".lora_B." in key)
        elif key + ANCHOR_SUFFIX in state:
            stock, anchor_key, axis = key, key + ANCHOR_SUFFIX, int(".lora_embedding_B." in key)
        else:
            continue
        trained, anchor = out.pop(key), out.pop(anchor_key)
        out[stock] = join(trained, anchor.to(trained.device), axis)
    return out
