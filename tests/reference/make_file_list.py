"""Rewrite the section "Every file" of docs/architecture.md.  python tests/reference/make_file_list.py"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("milora_vl", "data_tools/milora_data", "eval/milora_eval")
HEADING = "## Every file\n"
ABOUT = """
Each folder and each Python file with the first line of its docstring, for searching.
The script `tests/reference/make_file_list.py` writes this section; a test compares it with the files.
"""


def first_line(path: Path) -> str:
    """Return the first paragraph of the module docstring, as one line that ends with a full stop.

    A command stands there without backticks: tests execute the commands of the pages that have them.
    """
    paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    paragraph = re.sub(r"`(?:python -m )?(milora[ _][^`]*)`", r"\1", paragraph)
    return " ".join(paragraph.split()).rstrip(":.") + "."


def file_list() -> str:
    """Return the section: a heading for each folder, and a line for each file in it."""
    lines = [HEADING, ABOUT]
    for package in PACKAGES:
        for folder in sorted(path.parent for path in (ROOT / package).rglob("__init__.py")):
            name = folder.relative_to(ROOT).as_posix()
            lines.append(f"\n**`{name}/`** {first_line(folder / '__init__.py')}\n\n")
            files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
            lines += [f"- `{name}/{path.name}`: {first_line(path)}\n" for path in files]
    return "".join(lines)


if __name__ == "__main__":
    text, _, _ = PAGE.read_text(encoding="utf-8").partition(HEADING)
    PAGE.write_text(text.rstrip() + "\n\n" + file_list(), encoding="utf-8")
