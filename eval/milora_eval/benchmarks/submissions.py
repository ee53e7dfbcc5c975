"""Write files for servers and official scripts, after checking that they have the required format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_vl.base.atomic_write import write_text
from milora_vl.base.errors import DataError

Row = Mapping[str, Any]


def write_rows(path: Path, rows: Sequence[Row], types: Mapping[str, type | tuple[type, ...]], key: str) -> Path:
    """Write a JSON list of objects, or JSONL if the name ends in .jsonl; every row has exactly the keys of `types`.

    Raises DataError for a row with other keys or types, and for a duplicate `key`.
    """
    check_rows(rows, types, key)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(list(rows), ensure_ascii=False)
    return write_text(path, text)


def write_object(path: Path, value: Mapping[str, Any]) -> Path:
    """Write one JSON object."""
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=2))


def check_rows(rows: Sequence[Row], types: Mapping[str, type | tuple[type, ...]], key: str) -> None:
    """Raise DataError for a row whose keys or types differ from `types`, and for a duplicate `key`."""
    seen = set()
    for number, row in enumerate(rows, start=1):
        if set(row) != set(types) or not all(isinstance(row[name], kind) for name, kind in types.items()):
            raise DataError(
                f"row {number} of the submission is {row!r}, expected {dict(types)}", code="submission-format"
            )
        if row[key] in seen:
            raise DataError(
                f"duplicate {key} {row[key]!r}",
                code="submission-duplicate-id",
                where=f"row {number} of the submission",
                hint="keep one answer for each id",
            )
        seen.add(row[key])
