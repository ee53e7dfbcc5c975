"""docs/reference.md explains only codes that exist, each once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("milora_vl", "data_tools/milora_data", "eval/milora_eval", "studies")
PAGE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, re.MULTILINE)
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            yield f"{file}:{getattr(node, 'lineno', 0)}", node


def test_every_entry_of_the_page_is_a_code_and_none_has_two() -> None:
    texts = {node.value for _, node in nodes() if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert len(ENTRIES) == len(set(ENTRIES))
    assert [code for code in ENTRIES if code not in texts] == []
