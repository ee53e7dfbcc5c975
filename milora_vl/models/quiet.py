"""Keep off the screen what other packages say there and nobody waits for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hide the bars that transformers draws while it reads and writes weights; restores what was set before."""
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
    """Hide the bar of transformers' GGUF reader, which listens to no setting, and DeepSpeed's word meanwhile."""
    from transformers import modeling_gguf_pytorch_utils

    gguf: Any = modeling_gguf_pytorch_utils
    hush_deepspeed()
    drawn = gguf.tqdm
    gguf.tqdm = partial(drawn, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = drawn


def hush_deepspeed() -> None:
    """Keep off stdout DeepSpeed's word that there is no GPU: transformers imports it to save a model."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")
