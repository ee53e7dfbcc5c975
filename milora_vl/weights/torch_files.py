"""Read PyTorch's pickle files (.bin, .pt) safely: tensors only, since a pickle can run any code when it is read."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch

from milora_vl.base.errors import MALFORMED, Problem, UserError
from milora_vl.base.pickle_text import Instructions, scan

UNREAD = (UnpicklingError, RuntimeError, EOFError)
"""The errors of `read_pickled` for a truncated file, for other files, and for pickles with more than tensors."""
_SMALL = 1 << 20  # bytes
_OLD_FORMAT_PICKLES = 4  # magic number, version, system, content
# `torch.load` accepts these beside tensors, and a few bytes could make them allocate many GiB.
_NO_WEIGHTS = frozenset(("builtins.bytearray", "__builtin__.bytearray"))


def read_pickled(file: Path, *, mmap: bool = False) -> Any:
    """Return the content of a weight file, on the CPU. Raises one of UNREAD.

    With `mmap` the tensors are read when they are used, if the format of the file allows it. A file that would take
    much more memory than its size is refused: `torch.save` does not compress.
    """
    is_zip = is_zipfile(file)  # PyTorch's first format is no zip file and does not support mmap
    try:
        _require_proportion(file, is_zip=is_zip)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=(mmap and is_zip) or None)
    except UNREAD:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # the directory of a damaged zip file points before its start
            raise
        raise UnpicklingError("the directory of the zip file is damaged") from None
    except (BadZipFile, MemoryError, NotImplementedError, *MALFORMED) as error:
        raise UnpicklingError(f"{type(error).__name__}: {error}") from error
    for tensor in _tensors(content):
        if tensor.layout is not torch.strided:
            continue
        stored = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > max(1024 * stored, _SMALL):  # some are expanded (stride 0)
            raise UnpicklingError("a tensor claims more values than are stored: it was not read")
    return content


def _require_proportion(file: Path, *, is_zip: bool) -> None:
    """Raise UnpicklingError for a zip file that expands, and for a pickle that allocates without tensors."""
    if not is_zip:
        with file.open("rb") as opened, suppress(ValueError):  # fewer pickles: `torch.load` says what the first holds
            for _ in range(_OLD_FORMAT_PICKLES):
                _require_harmless(scan(opened))
        return
    with ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > file.stat().st_size:
            raise UnpicklingError("the file would expand when it is read: it was not read")
        for member in members:
            if member.filename.endswith(".pkl"):
                _require_harmless(scan(BytesIO(archive.read(member))))


def _require_harmless(found: Instructions) -> None:
    if found.is_bomb or found.names & _NO_WEIGHTS:
        raise UnpicklingError("its pickle would fill the memory: it was not read")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


AGAIN = "copy or download the file again, or use a checkpoint of the run"


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
        return Problem(message, "weight-unsafe-file", str(file), "use a .safetensors file, which holds only tensors")
    is_useful = bool(text) and not text.startswith("Weights only load failed")
    reason = text.splitlines()[0] if is_useful else "no file of weights"
    return Problem(f"cannot be read (cut off?): {reason}", "weight-damaged-file", str(file), AGAIN)


def why_unread(file: Path | str, error: BaseException) -> str:
    """Return the text of `unreadable`, without its hint."""
    return str(replace(unreadable(file, error), hint=""))


def unread(file: Path, error: BaseException) -> UserError:
    """Return the error of weights of another program that cannot be read."""
    problem = unreadable(file, error)
    return UserError(problem.message, code="weights-unreadable", where=problem.where, hint=problem.hint)
