"""docs/architecture.md names files that exist, and every package and module of milora_vl."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "reference"))
import make_file_list  # noqa: E402

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


def test_the_rows_have_the_order_of_the_layers() -> None:
    """The page says that a module imports only lower rows; import-linter checks the layers of pyproject.toml."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.findall(
        r'^    "([^"]+)",$', pyproject.partition('containers = ["milora_vl"]')[2].partition("]\n\n")[0], re.M
    )
    level = {module.strip(): number for number, layer in enumerate(layers) for module in layer.split(":")}
    rows = [line for line in PAGE.splitlines() if line.startswith("| `milora_vl/")]
    listed = [re.findall(r"`milora_vl/(\w+)(?:\.py)?`", row.split("|")[1]) for row in rows]
    levels = [level[name] for names in listed for name in names if name in level]
    assert levels == sorted(levels)
    assert len(levels) >= len(level) - 1  # __main__ has no row


def test_the_list_of_every_file_is_up_to_date() -> None:
    section = PAGE[PAGE.index(make_file_list.HEADING) :]
    assert section == make_file_list.file_list(), "to rewrite the list: python tests/reference/make_file_list.py"
