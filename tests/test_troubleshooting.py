"""docs/troubleshooting.md quotes messages that the code really gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# The first cell of a row of the tables whose first column is the message.
ROWS = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
QUOTED = [part for row in ROWS for part in re.findall(r"`([^`]+)`", row)]


@pytest.fixture(scope="module")
def texts() -> str:
    """All string constants of the packages, adjacent ones joined, without placeholders."""
    import ast

    found = []
    for folder in ("milora_vl", "data_tools", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("message", QUOTED)
def test_the_message_exists(message: str, texts: str) -> None:
    assert message.removesuffix("nan") in texts
