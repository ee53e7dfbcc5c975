"""Small files that are there as a whole: a killed process leaves the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> Path:
    """Write a text as a file, in one step; its folder is made. Of several processes the last one to end wins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)  # of a full disk
    return file


def write_json(file: Path, content: Any) -> Path:
    """Write a value as JSON, in one step; what JSON does not know is written as its text."""
    return write_text(file, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the mapping in a file; None where there is no file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
