"""Put D, E and the anchor into the LoRA layers that PEFT created, and read the factors back; dropout of a layer.

`difference.py` explains both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from milora_vl.common.compat.peft import set_variant
from milora_vl.core.adapter.difference import (
    ANCHOR,
    DELTA,
    Difference,
    DifferenceConv2d,
    DifferenceFactor,
    DifferenceLinear,
    lossless,
    recover,
    split,
)
from milora_vl.core.adapter.errors import AdapterError
from milora_vl.core.adapter.names import EARLIER
from milora_vl.core.weights.matrices import factor_dtype

_CLASSES: dict[type[nn.Module], type[DifferenceFactor]] = {nn.Linear: DifferenceLinear, nn.Conv2d: DifferenceConv2d}


def lora_layer(model: PeftModel, path: str) -> LoraLayer:
    """Return PEFT's LoRA layer at a module path of the base model. Raises AdapterError if it has been merged."""
    layer = model.get_base_model().get_submodule(path)
    if not isinstance(layer, LoraLayer):
        raise AdapterError(
            f"this layer has no adapter any more: it is a {type(layer).__name__}",
            code="adapter-merged",
            where=path,
            hint="after merge(model), save what it returned with its save_pretrained",
        )
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


def install_loaded(layer: LoraLayer, adapter: str, B0: Tensor | None) -> None:
    """Split the stock factors [D; A0] and [B0 + E, E] of a loaded adapter into differences and anchors.

    `B0` is the exact anchor (out, r) where the file has it. Anchors get the dtype of the base weight where that changes
    no value. A layer that was loaded over differences and anchors only gets B0.
    Raises ValueError if B0 does not belong to the factors.
    """
    dtype = factor_dtype(layer.get_base_layer())
    exact = None if B0 is None else lossless(_belonging(B0, factors(layer, adapter)[1]), dtype)
    if not has_anchor(layer, adapter):
        A, B = (split(joined, axis, dtype) for axis, joined in enumerate(factors(layer, adapter)))
        _put(layer, adapter, (A, B if exact is None else (B[0], exact)))
    elif exact is not None:
        layer.lora_B[adapter].register_buffer(ANCHOR, exact)


def _belonging(B0: Tensor, joined: Tensor) -> Tensor:
    """Return B0 in the shape of the halves of [B0 + E, E]. Raises ValueError if it is not its B0, up to rounding."""
    B, E = joined.detach().chunk(2, dim=1)
    B0 = B0.to(E.device).reshape(E.shape)
    if torch.linalg.vector_norm(B0.float() + E.float() - B.float()) > 0.01 * torch.linalg.vector_norm(B.float()):
        raise ValueError("the anchor does not belong to the factors")
    return B0


def install_copy(layer: LoraLayer, adapter: str, source: str) -> None:
    """Initialize an adapter at a copy of the anchor of `source`, with differences of the same dtype."""
    both = (layer.lora_A[source], layer.lora_B[source])
    pairs = zip((factor.get_parameter(DELTA) for factor in both), anchors_of(layer, source), strict=True)
    _put(layer, adapter, [(torch.zeros_like(delta), anchor.clone()) for delta, anchor in pairs])


def unrecoverable(layer: LoraLayer, adapter: str, joined: Tensor | None = None) -> Tensor | None:
    """Return B0 of an adapter if a reader of [B0 + E, E] would not get it back bit for bit, else None.

    `joined` is the factor that is saved, if it is not the one in the layer.
    """
    joined = factors(layer, adapter)[1] if joined is None else joined
    B0 = anchors_of(layer, adapter)[1]
    B, E = joined.detach().to(B0.device).chunk(2, dim=1)
    read = recover(B, E, factor_dtype(layer.get_base_layer()))
    return None if torch.equal(read.to(B0.dtype), B0) and torch.equal(B0.to(read.dtype), read) else B0


def _put(layer: LoraLayer, adapter: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Replace the stock factors of `adapter`; `pairs` is (difference, anchor) for A, then for B."""
    for axis, stock in enumerate((layer.lora_A[adapter], layer.lora_B[adapter])):
        _CLASSES[type(stock)].convert(stock, axis, *pairs[axis])
    if type(layer) is lora.Linear:  # a quantized layer or a subclass keeps its own forward
        set_variant(layer, adapter, Difference())


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the factors of an adapter as stock PEFT stores them: A' (2r, in) and B' (out, 2r)."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    if isinstance(first, DifferenceFactor) and isinstance(second, DifferenceFactor):
        return first.joined, second.joined
    A, B = first.weight, second.weight  # A is a buffer if it is fixed
    assert isinstance(A, Tensor)
    assert isinstance(B, Tensor)
    return A, B


def anchors_of(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the anchor of an adapter: A0 (r, in) and B0 (out, r)."""
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    assert isinstance(first, DifferenceFactor)
    assert isinstance(second, DifferenceFactor)
    return first.anchor, second.anchor


def has_anchor(layer: LoraLayer, adapter: str) -> bool:
    """Return True if `adapter` has a trained difference and an anchor in this layer."""
    return adapter in layer.lora_A and isinstance(layer.lora_A[adapter], DifferenceFactor)


def fixed_names(model: nn.Module) -> Iterator[str]:
    """Yield the names of the buffers of a model that never change: anchors, each fixed A, updates of earlier runs."""
    for name, module in model.named_modules():
        buffers = [buffer for buffer, _ in module.named_buffers(recurse=False)]
        if isinstance(module, DifferenceFactor):
            yield f"{name}.{ANCHOR}"
        elif ".lora_A." in name:
            yield from (f"{name}.{buffer}" for buffer in buffers)
        else:
            yield from (f"{name}.{buffer}" for buffer in buffers if buffer in EARLIER)
