"""Folders written by `save_to_disk` of `datasets`: one split, or several splits with one folder each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milora_vl.base.errors import DataError

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved(path: str | Path) -> bool:
    """Return whether `save_to_disk` wrote the folder `path`."""
    folder = Path(path)
    return (folder / _SPLITS).is_file() or ((folder / _STATE).is_file() and (folder / _INFO).is_file())


def files_of_saved(folder: Path) -> list[str]:
    """Return the files with the rows of a split, in order. Raises `DataError` if there are several splits."""
    if (folder / _SPLITS).is_file():
        names = _read(folder / _SPLITS, "splits")
        if len(names) != 1:
            choices = " or ".join(str(folder / str(name)) for name in names)
            raise DataError(
                f"this folder contains {len(names)} splits",
                code="data-several-splits",
                where=str(folder),
                hint=f"name one: {choices}",
            )
        folder = folder / str(names[0])
    files = [folder / str(entry["filename"]) for entry in _read(folder / _STATE, "_data_files")]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(
            f"no such file, although {folder / _STATE} names it",
            code="data-missing-file",
            where=str(missing[0]),
            hint="copy the whole folder again, or write it again with save_to_disk",
        )
    return list(map(str, files))


def _read(file: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"not a file that save_to_disk writes: {error}",
            code="data-unreadable",
            where=str(file),
            hint="copy the file again, or write the folder again with save_to_disk",
        ) from None
