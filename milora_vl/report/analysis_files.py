"""Read the results of `python -m milora_vl.analyze` (analysis/ in a run folder) for the report of the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from milora_vl.base.errors import UserError
from milora_vl.cli.table import Table
from milora_vl.report.plots import Plot


@dataclass(frozen=True, slots=True)
class Analysis:
    """The table of means, and (plot, caption) of each figure."""

    table: Table
    figures: list[tuple[Plot, str]]


def read_analysis(run: Path) -> Analysis | None:
    """Return the analysis of a run, or None without one. Raises UserError if a file cannot be parsed."""
    file = run / "analysis" / "summary.json"
    if not file.is_file():
        return None
    try:
        table = json.loads(file.read_text(encoding="utf-8"))["table"]
        file = file.with_name("figures.json")
        figures = json.loads(file.read_text(encoding="utf-8"))
        return Analysis(
            Table(tuple(table["header"]), tuple(tuple(row) for row in table["rows"]), table["caption"]),
            [(Plot(**figure["plot"]), figure["caption"]) for figure in figures],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot be read: {error}",
            code="file-unreadable",
            where=str(file),
            hint=f"repeat the analysis, or move {file.parent} away for a report without it",
        ) from error
