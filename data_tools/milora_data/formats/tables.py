"""Read a table row by row: .csv and .tsv with a header, or objects in .json and .jsonl."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from milora_data.formats.jsonfile import missing_file, not_utf8, read_objects
from milora_vl.base.errors import DataError

DELIMITERS = ",;\t"


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (place, row) as `read_objects` does; a row of .csv or .tsv is a dict with the names of the header as keys.

    A .csv may be separated by commas, semicolons (as European spreadsheets do) or tabs.
    Raises `DataError` with file and line if the file is missing or not UTF-8, or if its JSON or quoting is broken.
    """
    if path.suffix.lower() not in (".csv", ".tsv"):
        yield from read_objects(path)
        return
    if not path.is_file():
        raise missing_file(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            header = file.readline()
            file.seek(0)
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(DELIMITERS, key=header.count)
            reader = csv.DictReader(file, delimiter=delimiter)
            for row in reader:
                yield f"{reader.line_num}", row
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from None
        except csv.Error as error:
            raise DataError(
                f"broken table: {error}",
                code="table-syntax",
                where=str(path),
                hint="write the table again, as UTF-8 text with quoted fields",
            ) from None
