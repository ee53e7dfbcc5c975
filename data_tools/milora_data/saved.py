"""Folders that `save_to_disk` of `datasets` writes: one split, or several splits with a folder each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import DataError

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved(path: str | Path) -> bool:
    """Return whether `path` is such a folder."""
    folder = Path(path)
    return (folder / _SPLITS).is_file() or ((folder / _STATE).is_file() and (folder / _INFO).is_file())


def files_of_saved(folder: Path) -> list[str]:
    """Return the files with the rows of a split, in order. Raises `DataError` where there are several splits."""
    if (folder / _SPLITS).is_file():
        names = _read(folder / _SPLITS, "splits")
        if len(names) != 1:
            choices = " or ".join(str(folder / str(name)) for name in names)
            raise DataError(f"{folder}: this folder holds {len(names)} splits\nname one: {choices}")
        folder = folder / str(names[0])
    files = [folder / str(entry["filename"]) for entry in _read(folder / _STATE, "_data_files")]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"{missing[0]}: no such file, and {folder / _STATE} names it")
    return list(map(str, files))


def _read(file: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not what save_to_disk writes: {error}") from None
