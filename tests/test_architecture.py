"""docs/architecture.md names files that exist, and every package and module of milora_vl."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PATHS = re.findall(r"`((?:milora_vl|data_tools|eval|llava_recipes)/[\w/.]*)`", PAGE)


def test_named_files_and_folders_exist() -> None:
    assert len(PATHS) > 50
    assert not [path for path in PATHS if not (ROOT / path).exists()]


def test_every_package_and_module_is_named() -> None:
    folder = ROOT / "milora_vl"
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    modules = {path.name for path in folder.glob("[!_]*.py")}
    assert len(packages) > 10
    assert len(modules) > 5
    words = set(re.findall(r"[a-z_]+(?:\.py)?", PAGE))
    assert not (packages | modules) - words
