"""Silence progress bars and log lines of dependencies: transformers' weights and GGUF bars, DeepSpeed's message."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hide the progress bars of transformers for weights; restores the setting afterwards."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Hide the progress bar of transformers' GGUF reader, which ignores settings, and the message of DeepSpeed."""
    from transformers import modeling_gguf_pytorch_utils

    gguf: Any = modeling_gguf_pytorch_utils
    silence_deepspeed()
    original = gguf.tqdm
    gguf.tqdm = partial(original, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = original


def silence_deepspeed() -> None:
    """Hide DeepSpeed's message that there is no GPU: transformers imports DeepSpeed to save a model."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")
