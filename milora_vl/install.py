"""Put the two halves into the layers that PEFT made, and find them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from milora_vl.halves import Conv2dA, Conv2dB, EmbeddingHalves, Halves, LinearA, LinearB, lossless, split
from milora_vl.weights import factor_dtype

_CLASSES: dict[type[nn.Module], tuple[type[Halves], type[Halves]]] = {
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


def install(layer: LoraLayer, adapter: str, A0: Tensor, B0: Tensor) -> None:
    """Start adapter `adapter` of a layer at the anchor A0 (r, in), B0 (out, r): both halves hold these values."""
    pair = factors(layer, adapter)
    halves = [(anchor.to(old.device), old) for anchor, old in zip((A0, B0), pair, strict=True)]
    anchors = [anchor.reshape(_half_shape(old, axis)).contiguous() for axis, (anchor, old) in enumerate(halves)]
    put_halves(
        layer, adapter, [(anchor.to(old.dtype).clone(), anchor) for anchor, old in zip(anchors, pair, strict=True)]
    )


def install_loaded(layer: LoraLayer, adapter: str) -> None:
    """Turn a stock factor pair just loaded, [A; A0] and [B, -B0], into halves; the anchor in the base's dtype."""
    dtype = factor_dtype(layer.get_base_layer())
    halves = []
    for axis, joined in enumerate(factors(layer, adapter)):
        trained, anchor = split(joined, axis)
        halves.append((trained, lossless(anchor, dtype)))
    put_halves(layer, adapter, halves)


def install_copy(layer: LoraLayer, adapter: str, source: str) -> None:
    """Give adapter `adapter` the anchor of `source`, its trained halves starting there."""
    dtypes = [factor.dtype for factor in factors(layer, adapter)]
    anchors = [anchor.clone() for anchor in anchors_of(layer, source)]
    put_halves(layer, adapter, [(a.to(dtype), a) for a, dtype in zip(anchors, dtypes, strict=True)])


def put_halves(layer: LoraLayer, adapter: str, halves: list[tuple[Tensor, Tensor]]) -> None:
    """Replace the stock factors of `adapter` by (trained, anchor) for A and for B."""
    if adapter in layer.lora_embedding_A:
        for axis, name in enumerate(("lora_embedding_A", "lora_embedding_B")):
            holder = layer.get_submodule(name)
            if not isinstance(holder, EmbeddingHalves):
                holder = EmbeddingHalves.take_over(holder, axis)
            holder.set_halves(adapter, *halves[axis])
        return
    for axis, holder in enumerate((layer.lora_A, layer.lora_B)):
        kind = _CLASSES[type(holder[adapter])][axis]
        kind.take_over(holder[adapter], *halves[axis])


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the factors of an adapter as stock PEFT sees them: (2r, in) and (out, 2r)."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def anchors_of(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A0 and B0 of an adapter in halves."""
    if adapter in layer.lora_embedding_A:
        pair = layer.lora_embedding_A.anchor_of(adapter), layer.lora_embedding_B.anchor_of(adapter)
    else:
        pair = layer.lora_A[adapter].anchor, layer.lora_B[adapter].anchor
    return pair


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
            yield f"{name}.anchor"
        elif isinstance(module, EmbeddingHalves):
            yield from (f"{name}.{key}" for key, _ in module.named_buffers(recurse=False))


def joined_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the raw names of halves in a gathered state dict (ZeRO-3, FSDP1) under their stock names.

    `...lora_A.default.trained` and `.anchor` become `...lora_A.default.weight`; all else stays as it is.
    """
    out = dict(state)
    for key in state:
        prefix, _, name = key.rpartition(".")
        axis = 0 if ".lora_A." in key else 1
        if name == "trained" and f"{prefix}.anchor" in state:
            trained, anchor = out.pop(key), out.pop(f"{prefix}.anchor")
        elif f"{key}_anchor" in state:
            trained, anchor = out.pop(key), out.pop(f"{key}_anchor")
            prefix, axis = "", 0 if ".lora_embedding_A." in key else 1
        else:
            continue
        from milora_vl.halves import join

        out[f"{prefix}.weight" if prefix else key] = join(trained, anchor.to(trained.device), axis)
    return out


def _half_shape(joined: Tensor, axis: int) -> torch.Size:
    shape = list(joined.shape)
    shape[axis] //= 2
    return torch.Size(shape)
