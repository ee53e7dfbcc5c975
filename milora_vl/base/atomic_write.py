"""Write small files and new folders atomically: a killed process leaves the old one or the new one, never a part."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora_vl.base.json_text import parse_json
from milora_vl.base.secrets import without_secrets


def write_text(file: Path, text: str, *, hides_secrets: bool = False) -> Path:
    """Write a text file atomically and create its folder. If several processes write it, the last one wins.

    `hides_secrets` is for files that people share and no program reads back, such as reports.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(without_secrets(text) if hides_secrets else text, encoding="utf-8", newline="\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)  # remains if the disk is full
    return file


def write_json(file: Path, content: Any, *, hides_secrets: bool = False) -> Path:
    """Write a value as JSON atomically; values that JSON does not support are written as `str(value)`."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
    return write_text(file, text, hides_secrets=hides_secrets)


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder to write; it is renamed to `folder` when the block ends. Its parent is temporary.

    If another process has written `folder` meanwhile, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        staged = Path(scratch) / "staged"
        yield staged
        try:
            staged.rename(folder)
        except OSError:
            if not all((folder / file.name).exists() for file in staged.iterdir()):
                raise


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file; None if there is no file."""
    return dict(parse_json(file.read_text(encoding="utf-8"))) if file.is_file() else None
