"""docs/architecture.md names files that exist, and every room of milora_vl."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PATHS = re.findall(r"`((?:milora_vl|data_tools|eval|llava_recipes)/[\w/.]*)`", PAGE)


def test_named_files_and_folders_exist() -> None:
    assert len(PATHS) > 50
    assert not [path for path in PATHS if not (ROOT / path).exists()]


def test_every_room_is_named() -> None:
    rooms = {path.parent.name for path in (ROOT / "milora_vl").glob("*/__init__.py")}
    words = set(re.findall(r"[a-z_]+", PAGE))
    assert not rooms - words
