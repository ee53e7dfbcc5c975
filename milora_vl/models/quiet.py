"""Silence progress bars and log lines of dependencies: transformers' bars for weights, DeepSpeed's message."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_bars() -> Iterator[None]:
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def silence_deepspeed() -> None:
    """Hide DeepSpeed's message that there is no GPU: transformers imports DeepSpeed to save a model."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")
