"""Convert a folder of pictures with captions to LLaVA records: one text file per picture, or one table for all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import not_utf8, read_rows
from milora_data.pictures.files import SUFFIXES
from milora_data.records.record import IMAGE
from milora_vl.common.cli.command_line import amount, beside
from milora_vl.common.errors import DataError

UNREADABLE = (".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw")
TABLES = ("captions.json", "captions.jsonl", "captions.csv", "metadata.csv", "metadata.jsonl")
FILE_KEYS = ("image", "file_name", "file", "filename", "path")
TEXT_KEYS = ("caption", "text", "description")


def caption_records(folder: Path, prompt: str) -> Iterator[dict[str, Any]]:
    """Yield a record for each caption of each picture of `folder`, sorted by name; skipped files are logged.

    Raises `DataError` if the folder is missing or has no captions, if the table lacks the columns, or if a caption
    names a missing file.
    """
    if not folder.is_dir():
        raise DataError("no such folder", code="path-missing", where=str(folder), hint=beside(folder))
    # Hidden files are system files, such as .DS_Store, or ._a.jpg beside a.jpg.
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.name.startswith("."))
    pictures = [name for name in files if Path(name).suffix.lower() in SUFFIXES]
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    captions: dict[str, list[str]] = {}
    for name, text in _beside(folder, pictures) if table is None else (_row(row, table) for _, row in read_rows(table)):
        captions.setdefault(name, []).extend([text] if text else [])
    if not captions:
        raise DataError(
            "no captions",
            code="captions-missing",
            where=str(folder),
            hint=f"expected a.txt beside a.jpg, or one of: {', '.join(TABLES)}",
        )
    unknown = [name for name in captions if name not in set(pictures)]
    if unknown:
        raise DataError(
            f"{len(unknown):,} captions without a picture in {folder}: {', '.join(unknown[:5])}",
            code="captions-without-picture",
            where=str(table),
            hint="check the names in the table and the folder of the pictures",
        )
    _log_left_out("picture", "without a caption", [name for name in pictures if not captions.get(name)])
    unreadable = [name for name in files if Path(name).suffix.lower() in UNREADABLE]
    _log_left_out("picture", "in an unsupported format (save as JPEG or PNG)", unreadable)
    if table is None:
        used = {str(Path(name).with_suffix("")) for name in pictures}
        texts = [name for name in files if Path(name).suffix == ".txt"]
        _log_left_out("caption", "without a picture", [n for n in texts if str(Path(n).with_suffix("")) not in used])
    for name in pictures:
        for number, answer in enumerate(captions.get(name, ()), start=1):
            turns = [{"from": "human", "value": f"{IMAGE}\n{prompt}"}, {"from": "gpt", "value": answer}]
            identifier = str(Path(name).with_suffix("")) + (f"-{number}" if number > 1 else "")
            yield {"id": identifier, "image": name, "conversations": turns}


def _log_left_out(what: str, why: str, names: list[str]) -> None:
    if names:
        more = ", ..." if len(names) > 5 else ""
        sys.stderr.write(f"left out: {amount(len(names), what)} {why}: {', '.join(names[:5])}{more}\n")


def _beside(folder: Path, pictures: list[str]) -> Iterator[tuple[str, str]]:
    for name in pictures:
        path = (folder / name).with_suffix(".txt")
        if path.is_file():
            yield name, _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None


def _row(row: object, table: Path) -> tuple[str, str]:
    if isinstance(row, dict):
        name = next((row[key] for key in FILE_KEYS if row.get(key)), None)
        text = next((row[key] for key in TEXT_KEYS if row.get(key)), None)
        if isinstance(name, str) and isinstance(text, str):
            return name, text.strip()
    raise DataError(
        f"a row without file name or caption: {str(row)[:80]}",
        code="table-missing-columns",
        where=str(table),
        hint=f"expected columns: one of {', '.join(FILE_KEYS)} and one of {', '.join(TEXT_KEYS)}",
    )
