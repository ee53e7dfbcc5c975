"""Read pickles of plain data, such as RefCOCO's refs, without running code that they may contain."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import missing_file
from milora_vl.base.errors import MALFORMED, DataError, first_line
from milora_vl.base.pickle_text import scan


class _PlainUnpickler(pickle.Unpickler):
    """Loading a pickle can run any code; this unpickler accepts only lists, dicts, texts and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it contains {module}.{name}, not data alone")


def read_plain_pickle(path: Path) -> Any:
    """Return the lists, dicts, texts and numbers of a pickle (also Python 2). Raises `DataError` for other content."""
    if not path.is_file():
        raise missing_file(path)
    try:
        content = path.read_bytes()
        found = scan(io.BytesIO(content))
        if found.names or found.is_bomb:
            what = f"it contains {min(found.names)}, not data alone" if found.names else "it would fill the memory"
            raise pickle.UnpicklingError(what)
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, MemoryError, *MALFORMED) as error:
        raise DataError(
            f"cannot be read as a pickle of plain data: {first_line(error)}",
            code="data-unsafe-pickle",
            where=str(path),
            hint="use the published file, or store its content as JSON",
        ) from None
