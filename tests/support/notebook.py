"""Write examples/first_notebook.ipynb from the cells of first_notebook.py:  python tests/support/notebook.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "first_notebook.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def notebook() -> str:
    """Return the notebook of the script, without outputs."""
    cells = []
    for number, (kind, text) in enumerate(
        re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", SCRIPT.read_text("utf-8"), re.M | re.S)
    ):
        source = re.sub(r"^# ?", "", text, flags=re.MULTILINE) if kind else text
        cell = {"id": str(number), "metadata": {}, "source": source.strip().splitlines(keepends=True)}
        extra = {"cell_type": "markdown"} if kind else {"cell_type": "code", "execution_count": None, "outputs": []}
        cells.append(cell | extra)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return (
        json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(), "utf-8")
