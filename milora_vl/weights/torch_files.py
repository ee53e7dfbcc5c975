"""Read weights from PyTorch's pickle files (.bin, .pt), tensors only: a pickle can run any code when it is read."""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch

from milora_data.errors import Problem

UNREAD = (UnpicklingError, RuntimeError, EOFError)
"""The errors of `torch.load` for a truncated file, for other files, and for pickles with more than tensors."""


def read_pickled(file: Path, *, mmap: bool = False) -> Any:
    """Return the content of a weight file, on the CPU. Raises one of UNREAD.

    With `mmap` the tensors are read when they are used, if the format of the file allows it.
    """
    in_place = mmap and is_zipfile(file)  # PyTorch's first format is no zip file and does not support mmap
    return torch.load(file, map_location="cpu", weights_only=True, mmap=in_place or None)


def unreadable(file: Path | str, error: BaseException) -> Problem:
    """Return the problem that one of UNREAD means. PyTorch's own text advises to load the file without a check.

    >>> error = UnpicklingError("Weights only load failed. ... Unsupported global: GLOBAL os.system was")
    >>> print(unreadable("a.bin", error))
    a.bin: holds more than tensors (os.system), so reading it could run code: it was not read
    """
    text = str(error)  # PyTorch gives no other access to the name of the refused class
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused is not None:
        message = f"holds more than tensors ({refused[1]}), so reading it could run code: it was not read"
        return Problem(message, "weight-unsafe-file", str(file))
    is_useful = bool(text) and not text.startswith("Weights only load failed")
    reason = text.splitlines()[0] if is_useful else "no file of weights"
    return Problem(f"cannot be read (cut off?): {reason}", "weight-damaged-file", str(file))


def why_unread(file: Path | str, error: BaseException) -> str:
    """Return the text of `unreadable`."""
    return str(unreadable(file, error))
