"""One table of text cells, for pages (parts.html.j2), the terminal, Markdown and LaTeX."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Cells as text; the first cell of a row is its name. Each line of `caption` is a note."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    title: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown, with its title above and its notes below."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += [_row(self.header), "|---|" + "---:|" * (len(self.header) - 1), *map(_row, self.rows)]
        lines += ["", *(f"{note}  " for note in self.caption.splitlines())]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self) -> str:
        """Return a LaTeX tabular (booktabs) with the title and the notes as comments."""
        lines = [f"% {self.title}", rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}", r"\toprule"]
        body = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in (self.header, *self.rows)]
        lines += [body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"]
        return "\n".join([*lines, *(f"% {note}" for note in self.caption.splitlines())]) + "\n"


def show(table: Table, form: str) -> None:
    """Print a table to stdout as human, markdown or latex."""
    if form != "human":
        sys.stdout.write(table.markdown() if form == "markdown" else table.latex())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for place, name in enumerate(table.header):
        drawn.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)  # names may hold [ ] and :
    console.print(drawn)
    for note in table.caption.splitlines():
        console.print(note, style="dim", highlight=False)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
