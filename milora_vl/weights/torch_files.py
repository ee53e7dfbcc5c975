"""Weights in PyTorch's own files (.bin, .pt): pickles, which may run any code when they are read. Tensors alone are."""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch

UNREAD = (UnpicklingError, RuntimeError, EOFError)
"""What `torch.load` raises for a file that is cut off, no file of weights, or more than tensors."""


def read_pickled(file: Path, *, mmap: bool = False) -> Any:
    """Return the content of a file of weights, on the CPU; mmap: read as it is used. Raises one of UNREAD."""
    in_place = mmap and is_zipfile(file)  # PyTorch's first format cannot be
    return torch.load(file, map_location="cpu", weights_only=True, mmap=in_place or None)


def why_unread(file: Path | str, error: BaseException) -> str:
    """Say in a line what one of UNREAD means; PyTorch's own words advise to read the file all the same.

    >>> why_unread("a.bin", UnpicklingError("Weights only load failed. ... Unsupported global: GLOBAL os.system was"))
    'a.bin holds more than tensors (os.system): reading it could run code, so it is not read'
    """
    text = str(error)
    found = re.search(r"GLOBAL (\S+)", text)
    if found is not None:
        return f"{file} holds more than tensors ({found[1]}): reading it could run code, so it is not read"
    said = text.splitlines()[0] if text and not text.startswith("Weights only load failed") else "no file of weights"
    return f"{file} cannot be read (cut off?): {said}"
