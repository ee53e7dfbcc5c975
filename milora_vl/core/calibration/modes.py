"""The state of a model that is read, not trained: no dropout, no caches. Afterwards it is as the user left it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from milora_vl.core.policy.towers import keep_weights_readable


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each module is in its own mode, such as a frozen batch norm.

    Quantised weights, which a forward in this mode can repack, stay readable, after an error too.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
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
