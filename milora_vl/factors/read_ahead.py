"""Read the next weight from the disk while the present one is decomposed.

Weights of a file are usually mapped into memory: the system reads a page when it is used for the first time, and the
decomposition would wait for each. A thread that touches the pages one weight ahead waits instead.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn

Piece = TypeVar("Piece")


def one_ahead(pieces: Sequence[tuple[Piece, nn.Module | None]]) -> Iterator[Piece]:
    """Yield each piece of work. Meanwhile a thread reads the weights of the next piece's module (None: nothing)."""
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        for (piece, _), following in zip_longest(pieces, pieces[1:]):
            if following is not None and following[1] is not None:
                # An error of the disk is not lost: the decomposition reads the same page, in the main thread.
                reader.submit(read_weights, following[1])
            yield piece


def read_weights(module: nn.Module) -> int:
    """Touch each page of a module's own weights; return the number of pages. Weights on other devices have none."""
    return sum(_touch(weight.detach()) for weight in module.parameters(recurse=False))


def _touch(weight: Tensor) -> int:
    if weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
        return 0
    pages = weight.view(-1).view(torch.uint8)[:: mmap.PAGESIZE]
    pages.max()  # torch releases the interpreter while it waits for the disk
    return len(pages)
