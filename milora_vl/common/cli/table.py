"""One table of text cells, for pages (parts.html.j2), the terminal, Markdown and LaTeX."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable

LEAST_NAME = 16  # characters of a line of names
FORMATS = ("human", "markdown", "latex", "json")
_LATEX = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "_": r"\_",
        "#": r"\#",
        "$": r"\$",
        "±": r"$\pm$",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


@dataclass(frozen=True, slots=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    title: str = ""

    def markdown(self) -> str:
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += [_row(self.header), "|---|" + "---:|" * (len(self.header) - 1), *map(_row, self.rows)]
        lines += ["", *(f"{note}  " for note in self.caption.splitlines())]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self) -> str:
        lines = [f"% {self.title}", rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}", r"\toprule"]
        body = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in (self.header, *self.rows)]
        lines += [body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"]
        return "\n".join([*lines, *(f"% {note}" for note in self.caption.splitlines())]) + "\n"


def show(table: Table, form: str) -> None:
    if form != "human":
        sys.stdout.write(table.markdown() if form == "markdown" else table.latex())
        return
    # A pipe has no width. Names may hold [ ] and :
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = Console(width=width, markup=False, emoji=False)
    drawn(console, table.header, table.rows, left=table.header[:1], title=table.title)
    for note in table.caption.splitlines():
        console.print(note, style="dim", highlight=False)


def drawn(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str], title: str = ""
) -> None:
    """Print a table. The first column, of names, takes several lines where it is too wide; no other cell is cut."""
    table = RichTable(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    widths = [max(cell_len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    widths[0] = min(widths[0], LEAST_NAME)
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=column > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.width = max(console.width, sum(widths) + 3 * len(header) + 1)
    console.print(table)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
