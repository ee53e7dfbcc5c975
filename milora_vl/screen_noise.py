"""Keep transformers' own progress bars off the screen where they say nothing that a person waits for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hide the bars that transformers draws while it reads and writes weights; restores what was set before."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Hide the bar of transformers' GGUF reader, which listens to no setting, and what packages warn of meanwhile."""
    from transformers import modeling_gguf_pytorch_utils as gguf

    drawn, level = gguf.tqdm, logging.root.manager.disable
    gguf.tqdm = partial(drawn, disable=True)
    logging.disable(logging.WARNING)  # DeepSpeed tells every process that finds no GPU
    try:
        yield
    finally:
        gguf.tqdm = drawn
        logging.disable(level)
