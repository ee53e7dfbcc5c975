"""A folder of pictures with captions as LLaVA records: a text file beside each, or one table for all."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError
from .jsonfile import read_objects
from .templates import IMAGE

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TABLES = ("captions.json", "captions.jsonl", "captions.csv", "metadata.csv", "metadata.jsonl")
FILE_KEYS = ("image", "file_name", "file", "filename", "path")
TEXT_KEYS = ("caption", "text", "description")


def caption_records(folder: Path, prompt: str) -> Iterator[dict[str, Any]]:
    """Yield one record per picture of `folder` that has a caption, in the order of names; says how many have none.

    Raises `DataError`: no folder, no captions, a table without the columns, a caption for a file that is not there.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    pictures = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    captions = _beside(folder, pictures) if table is None else dict(_rows(table))
    if not captions:
        raise DataError(f"{folder}: no captions\nexpected a.txt beside a.jpg, or one of: {', '.join(TABLES)}")
    unknown = [name for name in captions if name not in set(pictures)]
    if unknown:
        raise DataError(f"{table}: {len(unknown):,} captions without a picture in {folder}: {', '.join(unknown[:5])}")
    without = [name for name in pictures if name not in captions]
    if without:
        sys.stderr.write(f"left out: {len(without):,} pictures without a caption: {', '.join(without[:5])}\n")
    for name in pictures:
        if name in captions:
            question, answer = f"{IMAGE}\n{prompt}", captions[name]
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            yield {"id": str(Path(name).with_suffix("")), "image": name, "conversations": turns}


def _beside(folder: Path, pictures: list[str]) -> dict[str, str]:
    texts = {name: (folder / name).with_suffix(".txt") for name in pictures}
    return {name: path.read_text(encoding="utf-8").strip() for name, path in texts.items() if path.is_file()}


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    if table.suffix == ".csv":
        with table.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                yield _row(row, table)
        return
    if table.suffix == ".json" and table.read_text(encoding="utf-8-sig").lstrip().startswith("{"):
        yield from _mapping(table)
    else:
        yield from (_row(value, table) for _, value in read_objects(table))


def _mapping(table: Path) -> Iterator[tuple[str, str]]:
    try:
        content = json.loads(table.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{table}:{error.lineno}: broken JSON: {error.msg}") from None
    for name, text in content.items():
        yield _row({"file": name, "text": text}, table)


def _row(row: object, table: Path) -> tuple[str, str]:
    if isinstance(row, dict):
        name = next((row[key] for key in FILE_KEYS if row.get(key)), None)
        text = next((row[key] for key in TEXT_KEYS if row.get(key)), None)
        if isinstance(name, str) and isinstance(text, str):
            return name, text.strip()
    raise DataError(
        f"{table}: a row without file name or caption: {str(row)[:80]}\n"
        f"expected columns: one of {', '.join(FILE_KEYS)} and one of {', '.join(TEXT_KEYS)}"
    )
