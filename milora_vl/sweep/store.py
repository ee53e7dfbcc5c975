"""Small JSON files that are there as a whole, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the mapping in a file; None where there is no file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as a file, in one step."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file in one step; its folder is made. Of several processes that write the same file the last one wins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
