"""Read and write Excel tables with openpyxl (extra `eval`). Text stays text, even if it looks like a formula."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from milora_data.errors import UserError

Cell = str | int | float | None


def _missing_openpyxl() -> UserError:
    return UserError(
        ".xlsx files need openpyxl", code="package-missing", hint="install it: pip install 'milora-vl[eval]'"
    )


def write_xlsx(path: Path, names: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Path:
    """Write one sheet with a header and check that it can be read back. Control characters are removed."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    book.save(partial)
    partial.replace(path)
    if len(read_xlsx(path)) != len(rows):
        raise ValueError(f"{path} cannot be read back: a different number of rows")
    return path


def read_xlsx(path: Path) -> list[dict[str, Cell]]:
    """Return the rows of the first sheet by the names in its header; empty cells are None."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise _missing_openpyxl() from None
    with closing(load_workbook(path, read_only=True)) as book:
        rows = list(book.worksheets[0].iter_rows(values_only=True))
    return [dict(zip(map(str, rows[0]), row, strict=False)) for row in rows[1:]] if rows else []


def _openpyxl() -> tuple[Any, Any]:
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise _missing_openpyxl() from None
    return Workbook, ILLEGAL_CHARACTERS_RE
