"""Pickles of plain data (RefCOCO's refs are shipped as such), read without running what they may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from milora_data.errors import DataError
from milora_data.jsonfile import missing_file


class _PlainUnpickler(pickle.Unpickler):
    """A pickle may run any code when it is read; this one takes lists, dicts, texts and numbers alone."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}, not data alone")


def read_plain_pickle(path: Path) -> Any:
    """Return the lists, dicts, texts and numbers of a pickle, Python 2's too. DataError for any other."""
    if not path.is_file():
        raise DataError(missing_file(path))
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as a pickle of plain data: {error}") from None
