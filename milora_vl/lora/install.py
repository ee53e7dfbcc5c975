"""Install the trained half and the anchor in the layers that PEFT created, and read them back.

`layers.py` explains the halves. PEFT stores factors in three ways (Linear and Conv2d modules, ParameterDicts of
embeddings); the functions here hide the difference from the rest of the package.
"""

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
    """Return PEFT's LoRA layer at a module path of the base model."""
    layer = model.get_base_model().get_submodule(path)
    assert isinstance(layer, LoraLayer), f"{path} is a {type(layer).__name__}"
    return layer


def base_model_of(model: nn.Module) -> nn.Module:
    """Return the model under a PEFT wrapper, or the model itself."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def base_layer(model: nn.Module, path: str) -> nn.Module:
    """Return the base model's own layer at `path`, without the LoRA layer around it."""
    layer = base_model_of(model).get_submodule(path)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def set_dropout(layer: LoraLayer, adapter: str, probability: float) -> None:
    """Set the dropout of one adapter in one layer. PEFT's config has a single value for all layers."""
    was_training = layer.lora_dropout.training
    layer.lora_dropout[adapter] = nn.Dropout(probability) if probability > 0 else nn.Identity()
    layer.lora_dropout.train(was_training)


def install(layer: LoraLayer, adapter: str, A0: Tensor, B0: Tensor) -> None:
    """Initialize an adapter of a layer: trained halves and anchors are both A0 (r, in) and B0 (out, r)."""
    halves = []
    for axis, (anchor, stock) in enumerate(zip((A0, B0), factors(layer, adapter), strict=True)):
        shape = list(stock.shape)  # (2r, in, kh, kw) and (out, 2r, 1, 1) for a convolution
        shape[axis] //= 2
        anchor = anchor.to(stock.device).reshape(shape).contiguous()
        halves.append((anchor.to(stock.dtype, copy=True), anchor))
    _put(layer, adapter, halves)


def install_loaded(layer: LoraLayer, adapter: str) -> None:
    """Split the stock factors of a loaded adapter, [A; A0] and [B, -B0], into halves.

    The anchor gets the dtype of the base weight where that changes no value.
    """
    dtype = factor_dtype(layer.get_base_layer())
    pairs = [split(joined, axis) for axis, joined in enumerate(factors(layer, adapter))]
    _put(layer, adapter, [(trained, lossless(anchor, dtype)) for trained, anchor in pairs])


def install_copy(layer: LoraLayer, adapter: str, source: str) -> None:
    """Initialize an adapter at the anchor of the adapter `source`. The anchor is a copy."""
    dtypes = [factor.dtype for factor in factors(layer, adapter)]
    anchors = [anchor.clone() for anchor in anchors_of(layer, source)]
    _put(layer, adapter, [(a.to(dtype, copy=True), a) for a, dtype in zip(anchors, dtypes, strict=True)])


def _put(layer: LoraLayer, adapter: str, halves: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Replace the stock factors of `adapter`; `halves` is (trained, anchor) for A, then for B."""
    if adapter in layer.lora_embedding_A:
        for axis, stock_dict in enumerate((layer.lora_embedding_A, layer.lora_embedding_B)):
            embedding: EmbeddingHalves
            if isinstance(stock_dict, EmbeddingHalves):  # another adapter was installed before
                embedding = stock_dict
            else:
                embedding = EmbeddingHalves.take_over(stock_dict, axis)
            embedding.set_halves(adapter, *halves[axis])
        return
    for axis, stock in enumerate((layer.lora_A[adapter], layer.lora_B[adapter])):
        _KINDS[type(stock)][axis].take_over(stock, *halves[axis])


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the factors of an adapter as stock PEFT stores them: A' (2r, in) and B' (out, 2r)."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    if isinstance(first, Halves) and isinstance(second, Halves):
        return first.joined, second.joined
    return first.get_parameter("weight"), second.get_parameter("weight")


def trained_factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the trained parameters of an adapter, A (r, in) and B (out, r).

    For a convolution they are (r, in, kh, kw) and (out, r, 1, 1), for a plain LoRA its whole factors.
    """
    if adapter in layer.lora_embedding_A:
        holders = (layer.lora_embedding_A, layer.lora_embedding_B)
        return holders[0].get_parameter(adapter), holders[1].get_parameter(adapter)
    pair = (layer.lora_A[adapter], layer.lora_B[adapter])
    A, B = (half.get_parameter(TRAINED if isinstance(half, Halves) else "weight") for half in pair)
    return A, B


def anchors_of(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the anchor of an adapter: A0 (r, in) and B0 (out, r)."""
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
    """Return True if `adapter` has a trained half and an anchor in this layer."""
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
    """Return a gathered state dict (ZeRO-3, FSDP1) with the halves joined under their stock names.

    `...lora_A.default.trained` and `.anchor` become `...lora_A.default.weight`. Other entries are unchanged.

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
