"""Read and write Excel tables with openpyxl (extra `eval`). Text stays text, even if it looks like a formula."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError
from zipfile import BadZipFile

from milora_vl.common.atomic_write import atomic_file
from milora_vl.common.errors import MALFORMED, DataError, UserError, first_line

Cell = str | int | float | None


def _missing_openpyxl() -> UserError:
    return UserError(".xlsx files need openpyxl", code="package-missing", hint="install it: pip install -e '.[eval]'")


def write_xlsx(path: Path, names: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Path:
    """Write one sheet with a header. Control characters are removed."""
    workbook, illegal = _openpyxl()
    book = workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    for number, row in enumerate([list(names), *rows], start=1):
        for column, value in enumerate(row, start=1):
            cell = sheet.cell(number, column)
            if isinstance(value, str):
                cell.value = illegal.sub("", value)[:32767]
                cell.data_type = "s"
            else:
                cell.value = value
    with atomic_file(path) as partial:
        book.save(partial)
    return path


def read_xlsx(path: Path) -> list[dict[str, Cell]]:
    """Return the rows of the first sheet by the names in its header; empty cells are None, empty rows left out.

    Raises DataError if the file is damaged.
    """
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise _missing_openpyxl() from None
    try:
        with closing(load_workbook(path, read_only=True)) as book:
            return _by_header(book.worksheets[0].iter_rows(values_only=True))
    except (BadZipFile, zlib.error, ParseError, OSError, *MALFORMED) as error:
        reason = f"cannot be read as an Excel table: {first_line(error)}"
        raise DataError(reason, code="data-unreadable", where=str(path), hint="copy or save the file again") from None


def _by_header(rows: Iterator[tuple[Cell, ...]]) -> list[dict[str, Cell]]:
    header = [str(name) for name in next(rows, ())]
    while header and header[-1] == "None":
        del header[-1]
    filled = (row[: len(header)] for row in rows)
    return [dict(zip(header, row, strict=False)) for row in filled if any(cell is not None for cell in row)]


def _openpyxl() -> tuple[Any, Any]:
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise _missing_openpyxl() from None
    return Workbook, ILLEGAL_CHARACTERS_RE
