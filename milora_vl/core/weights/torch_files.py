"""Read files of weights, .safetensors and pickles (.bin, .pt); pickles as tensors only, because they can run code."""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from milora_vl.common.errors import MALFORMED, Problem, UserError

AGAIN = "copy or download the file again, or use a checkpoint of the run"
UNREAD = (SafetensorError, UnpicklingError, RuntimeError, EOFError, *MALFORMED)
"""What safetensors and torch raise for a file that is damaged, of another kind, or holds more than tensors."""


def read_weights(file: Path, *, mmap: bool = False) -> Any:
    """Return the content of a weight file, on the CPU: a dict of tensors, or what `torch.save` has stored.

    With `mmap` the tensors of a pickle are read when they are used, if the format of the file allows it.
    Raises UserError for a file that is damaged, of another kind, or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # PyTorch's first format is no zip file and does not support mmap.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=(mmap and is_zipfile(file)) or None)
    except UNREAD as error:
        raise UserError(problems=[unreadable(file, error)]) from None


def unreadable(file: Path | str, error: BaseException) -> Problem:
    """Return the problem that one of UNREAD means. PyTorch's own text advises to load the file without a check.

    >>> error = UnpicklingError("Weights only load failed. ... Unsupported global: GLOBAL os.system was")
    >>> unreadable("a.bin", error).message
    'holds more than tensors (os.system), so reading it could run code: it was not read'
    """
    text = str(error)  # PyTorch gives no other access to the name of the refused class
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused is not None:
        message = f"holds more than tensors ({refused[1]}), so reading it could run code: it was not read"
        return Problem(message, "weights-unreadable", str(file), "use a .safetensors file, which holds only tensors")
    is_useful = bool(text) and not text.startswith("Weights only load failed")
    reason = text.splitlines()[0] if is_useful else "no file of weights"
    return Problem(f"cannot be read (cut off?): {reason}", "weights-unreadable", str(file), AGAIN)
