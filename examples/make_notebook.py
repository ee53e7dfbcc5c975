"""Write first_adapter.ipynb from first_adapter.py: `# %%` starts a cell, `# %% [markdown]` one of text."""

import json
from pathlib import Path

SCRIPT = Path(__file__).with_name("first_adapter.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def notebook(script: str) -> dict[str, object]:
    """Return the notebook of a script as the values of its JSON."""
    cells: list[dict[str, object]] = []
    for number, part in enumerate(script.split("# %%")[1:]):
        is_text = part.startswith(" [markdown]")
        body = part.partition("\n")[2].strip("\n")
        if is_text:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        cell: dict[str, object] = {"id": f"cell-{number}", "metadata": {}, "source": body.splitlines(keepends=True)}
        kind = "markdown" if is_text else "code"
        cells.append(cell | {"cell_type": kind} | ({} if is_text else {"execution_count": None, "outputs": []}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    made = notebook(SCRIPT.read_text(encoding="utf-8"))
    NOTEBOOK.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(NOTEBOOK)
