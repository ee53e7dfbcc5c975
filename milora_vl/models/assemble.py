"""Models are put together whole, also in a run that will share its weights out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def whole_weights() -> Iterator[None]:
    """While inside, transformers loads and makes models as if there were no ZeRO-3; what is read then has all parts."""
    from transformers.integrations import deepspeed

    told = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = told
