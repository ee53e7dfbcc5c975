"""Read pickles of plain data, such as RefCOCO's refs, without running code that they may contain."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from milora_data.errors import DataError
from milora_data.formats.jsonfile import missing_file


class _PlainUnpickler(pickle.Unpickler):
    """Loading a pickle can run any code; this unpickler accepts only lists, dicts, texts and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it contains {module}.{name}, not data alone")


def read_plain_pickle(path: Path) -> Any:
    """Return the lists, dicts, texts and numbers of a pickle (also Python 2). Raises `DataError` for other content."""
    if not path.is_file():
        raise missing_file(path)
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise DataError(
            f"cannot be read as a pickle of plain data: {error}", code="data-unsafe-pickle", where=str(path)
        ) from None
