"""Run a model for an evaluation: modules in evaluation mode, no caches, quantized weights that stay readable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each module is in its own mode, such as a frozen batch norm.

    Quantised weights, which a forward in this mode can repack, stay readable, after an error too, and Qwen-VL forgets
    the positions of pictures in the last batch.
    """
    training = [module for module in model.modules() if module.training]
    deltas = {module: module.rope_deltas for module in model.modules() if hasattr(module, "rope_deltas")}
    keep_weights_readable(model)
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, before in deltas.items():
            module.rope_deltas = before
        keep_weights_readable(model)


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let forwards keep no keys, values and states: they need memory, and a block that runs again would add to them."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in {id(one): one for one in found}.values() if getattr(config, "use_cache", False)]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


def keep_weights_readable(model: nn.Module) -> list[str]:
    """Prevent bitsandbytes from changing weights in a forward pass, and return the modules it has repacked already.

    On CPUs with AVX512-BF16 a forward in eval mode repacks 4-bit weights. Dequantizing repacked weights gives wrong
    values, and so wrong factors, fingerprints and merges. A forward also moves the scales of 8-bit weights to another
    object, where dequantization does not find them; they are copied back.
    """
    repacked = []
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):  # PEFT's layers have the same class names
            continue
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                repacked.append(path)
        elif type(module).__name__ == "Linear8bitLt" and module.weight.SCB is None:  # type: ignore[union-attr]
            module.weight.SCB = module.state.SCB  # type: ignore[union-attr]
    return repacked
