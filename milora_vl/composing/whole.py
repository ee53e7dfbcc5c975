"""Models that are put together inside a run whose own model ZeRO-3 cuts up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, transformers makes and loads models whole in this process, whatever stage of ZeRO the run has."""
    from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    settings = deepspeed._hf_deepspeed_config_weak_ref  # HF has no way to ask for it
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = settings
