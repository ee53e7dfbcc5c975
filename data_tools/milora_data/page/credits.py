"""Credits for the pictures on a page, from the README.md beside the data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def credit_lines(folders: Iterable[Path]) -> list[str]:
    """Return the lines that mention a licence in the README.md of each folder, without repeats."""
    readmes = dict.fromkeys((folder / "README.md").resolve() for folder in folders)
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in readmes if file.is_file())
    lines = (line.strip(" *-").replace("`", "") for text in texts for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if re.search(r"\blicen[cs]e\b", line, re.IGNORECASE)))
