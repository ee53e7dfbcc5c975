"""docs/architecture.md names files that exist, and every package and module of milora_vl."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PATHS = re.findall(r"`((?:milora_vl|data_tools|eval|llava_recipes)/[\w/.]*)`", PAGE)


def test_named_files_and_folders_exist() -> None:
    assert len(PATHS) > 50
    assert not [path for path in PATHS if not (ROOT / path).exists()]


def test_every_package_and_module_is_in_the_table() -> None:
    folder = ROOT / "milora_vl"
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    modules = {path.name for path in folder.glob("[!_]*.py")}
    assert len(packages) > 10
    assert len(modules) > 5
    table = PAGE.partition("| package or module |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = {path.removeprefix("milora_vl/") for cell in cells for path in re.findall(r"`([^`]+)`", cell)}
    assert (packages | modules) - named == set()
