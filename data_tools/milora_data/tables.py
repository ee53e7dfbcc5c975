"""Rows of a table, one by one: .csv and .tsv with a header, or objects in .json and .jsonl."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from milora_data.errors import DataError
from milora_data.jsonfile import missing_file, read_objects

DELIMITERS = ",;\t"


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (place, row), the place as of `read_objects`; a row of .csv or .tsv is a dict by the names in the header.

    A .csv may be separated by commas, semicolons (as spreadsheets write it in half of Europe) or tabs.
    Raises `DataError` with file and line: no such file, not UTF-8, broken JSON or quoting.
    """
    if path.suffix.lower() not in (".csv", ".tsv"):
        yield from read_objects(path)
        return
    if not path.is_file():
        raise DataError(missing_file(path))
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            header = file.readline()
            file.seek(0)
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(DELIMITERS, key=header.count)
            reader = csv.DictReader(file, delimiter=delimiter)
            for row in reader:
                yield f"{reader.line_num}", row
        except UnicodeDecodeError as error:
            raise DataError(not_utf8(path, error)) from None
        except csv.Error as error:
            raise DataError(f"{path}: broken table: {error}") from None


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Return the message for a text in another encoding, and how to change it."""
    byte = error.object[error.start]
    return (
        f"{path}: not UTF-8 (byte 0x{byte:02x})\nsave it as UTF-8 (in a spreadsheet: CSV UTF-8), or where it comes "
        "from Windows:\n  iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
    )
