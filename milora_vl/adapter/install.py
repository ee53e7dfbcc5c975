"""Put D, E and the anchor into the LoRA layers that PEFT created, and read the factors back; dropout of a layer.

`layers.py` explains both. PEFT stores factors in three ways (Linear and Conv2d modules, ParameterDicts of
embeddings); the functions here hide the difference from the rest of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from milora_vl.adapter.layers import (
    ANCHOR,
    ANCHOR_SUFFIX,
    DELTA,
    AdaptedLinear,
    Conv2dA,
    Conv2dB,
    EmbeddingHalves,
    Halves,
    LinearA,
    LinearB,
    join,
    lossless,
    recover,
    split,
    split_1,
)
from milora_vl.weights.matrices import factor_dtype

_PREFIX = "base_model.model."
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


def install_factors(layer: LoraLayer, adapter: str, A0: Tensor, B0: Tensor) -> None:
    """Initialize an adapter of a layer: the differences are zero, the anchors A0 (r, in) and B0 (out, r)."""
    pairs = []
    for axis, (anchor, stock) in enumerate(zip((A0, B0), factors(layer, adapter), strict=True)):
        shape = list(stock.shape)  # (2r, in, kh, kw) and (out, 2r, 1, 1) for a convolution
        shape[axis] //= 2
        anchor = anchor.to(stock.device).reshape(shape).contiguous()
        pairs.append((torch.zeros_like(anchor, dtype=stock.dtype), anchor))
    _put(layer, adapter, pairs)


def install_loaded(layer: LoraLayer, adapter: str, version: int, B0: Tensor | None) -> None:
    """Split the stock factors of a loaded adapter into differences and anchors.

    `version` is the format of milora.json: 2 for [D; A0] and [B0 + E, E], 1 for [A; A0] and [B, -B0]. `B0` is the
    exact anchor (out, r) where the file has it. Anchors get the dtype of the base weight where that changes no value.
    Raises ValueError if B0 does not belong to the factors.
    """
    dtype = factor_dtype(layer.get_base_layer())
    read = split if version > 1 else split_1
    pairs = [read(joined, axis, dtype) for axis, joined in enumerate(factors(layer, adapter))]
    if B0 is not None:
        E = pairs[1][0]
        B0 = B0.to(E.device).reshape(E.shape)
        require_belongs(factors(layer, adapter)[1], E, B0)
        pairs[1] = E, lossless(B0, dtype)
    _put(layer, adapter, pairs)


def require_belongs(joined: Tensor, E: Tensor, B0: Tensor) -> None:
    """Raise ValueError unless B0 + E is the first half of a saved factor [B0 + E, E], up to rounding."""
    B = joined.detach().chunk(2, dim=1)[0].float()
    error = torch.linalg.vector_norm(B0.float() + E.float() - B)
    if error > 0.01 * torch.linalg.vector_norm(B):
        raise ValueError("the anchor does not belong to the factors")


def install_copy(layer: LoraLayer, adapter: str, source: str) -> None:
    """Initialize an adapter at the anchor of the adapter `source`. The anchor is a copy."""
    A0, B0 = (anchor.clone() for anchor in anchors_of(layer, source))
    install_factors(layer, adapter, A0, B0)


def unrecoverable(layer: LoraLayer, adapter: str, joined: Tensor | None = None) -> Tensor | None:
    """Return B0 of an adapter if a reader of [B0 + E, E] would not get it back bit for bit, else None.

    `joined` is the factor that is saved, if it is not the one in the layer.
    """
    joined = factors(layer, adapter)[1] if joined is None else joined
    B0 = anchors_of(layer, adapter)[1]
    B, E = joined.detach().to(B0.device).chunk(2, dim=1)
    read = recover(B, E, factor_dtype(layer.get_base_layer()))
    return None if torch.equal(read.to(B0.dtype), B0) and torch.equal(B0.to(read.dtype), read) else B0


def _put(layer: LoraLayer, adapter: str, halves: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Replace the stock factors of `adapter`; `halves` is (difference, anchor) for A, then for B."""
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
    if type(layer) is lora.Linear:  # a quantized layer or a subclass keeps its own forward
        layer.__class__ = AdaptedLinear


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the factors of an adapter as stock PEFT stores them: A' (2r, in) and B' (out, 2r)."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    if isinstance(first, Halves) and isinstance(second, Halves):
        return first.joined, second.joined
    return first.get_parameter("weight"), second.get_parameter("weight")


def trained_factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the trained parameters of an adapter: D (r, in) and E (out, r), or A and B of a plain LoRA.

    For a convolution they are (r, in, kh, kw) and (out, r, 1, 1).
    """
    if adapter in layer.lora_embedding_A:
        holders = (layer.lora_embedding_A, layer.lora_embedding_B)
        return holders[0].get_parameter(adapter), holders[1].get_parameter(adapter)
    pair = (layer.lora_A[adapter], layer.lora_B[adapter])
    first, second = (half.get_parameter(DELTA if isinstance(half, Halves) else "weight") for half in pair)
    return first, second


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
    """Return True if `adapter` has a trained difference and an anchor in this layer."""
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
    """Return a gathered state dict (ZeRO-3, FSDP2) with differences and anchors joined under their stock names.

    `...lora_A.default.delta` and `.anchor` become `...lora_A.default.weight`. Other entries are unchanged.

    >>> import torch
    >>> raw = {"l.lora_A.x.delta": torch.ones(1, 2), "l.lora_A.x.anchor": torch.zeros(1, 2)}
    >>> {name: tuple(t.shape) for name, t in joined_state(raw).items()}
    {'l.lora_A.x.weight': (2, 2)}
    """
    out = dict(state)
    for key in state:
        prefix, _, name = key.rpartition(".")
        if name == DELTA and f"{prefix}.{ANCHOR}" in state:
            stock, anchor_key, axis = f"{prefix}.weight", f"{prefix}.{ANCHOR}", int(".lora_B." in key)
        elif key + ANCHOR_SUFFIX in state:
            stock, anchor_key, axis = key, key + ANCHOR_SUFFIX, int(".lora_embedding_B." in key)
        else:
            continue
        delta, anchor = out.pop(key), out.pop(anchor_key)
        out[stock] = join(delta, anchor.to(delta.device), axis)
    return out


def current_state(
    state: Mapping[str, Tensor],
    layers: Mapping[str, LoraLayer],
    adapter: str,
    version: int,
    anchors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return a state dict for `layers` (by path) in which factors of format version 1 are converted.

    `version` is that of the file. `anchors` has the exact B0 by path; it is added to the state dict.
    Raises ValueError if such a B0 does not belong to its factors.
    """
    out = dict(state)
    for path, layer in layers.items():
        names = _joined_names(state, path, layer, adapter)
        if names is None:
            continue
        is_embedding = adapter in layer.lora_embedding_A
        raw = [name.removesuffix(".weight") for name in names]
        delta, anchor = ("", ANCHOR_SUFFIX) if is_embedding else (f".{DELTA}", f".{ANCHOR}")
        if version == 1:
            for axis, (name, key) in enumerate(zip(raw, names, strict=True)):
                pair = split_1(out.pop(key), axis, anchors_of(layer, adapter)[axis].dtype)
                out[name + delta], out[name + anchor] = pair
        elif path in anchors:
            E = state[names[1]].chunk(2, dim=1)[1]
            B0 = anchors[path].to(E.device).reshape(E.shape)
            require_belongs(state[names[1]], E, B0)
            out[raw[1] + anchor] = B0
    return out


def holds_version_1(state: Mapping[str, Tensor], layers: Mapping[str, LoraLayer], adapter: str) -> bool:
    """Return True if the factors of `layers` in a state dict have format version 1: B ends in -B0."""
    for path, layer in layers.items():
        names = _joined_names(state, path, layer, adapter)
        if names is None:
            continue
        second = state[names[1]].detach().chunk(2, dim=1)[1]
        B0 = anchors_of(layer, adapter)[1]
        if bool(second.any()) and torch.equal(second, -B0.to(second.dtype).to(second.device)):
            return True
    return False


def _joined_names(state: Mapping[str, Tensor], path: str, layer: LoraLayer, adapter: str) -> list[str] | None:
    """Return the names of both joined factors in a state dict. None if they are absent or do not fit the layer."""
    pattern = "lora_embedding_{}.{}" if adapter in layer.lora_embedding_A else "lora_{}.{}.weight"
    names = [f"{_PREFIX}{path}.{pattern.format(side, adapter)}" for side in "AB"]
    pairs = zip(names, factors(layer, adapter), strict=True)
    return names if all(name in state and state[name].shape == factor.shape for name, factor in pairs) else None
