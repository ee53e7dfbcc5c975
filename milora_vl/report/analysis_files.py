"""What `python -m milora_vl.analyze` left in a run folder (analysis/), for the run's report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from milora_data.errors import UserError
from milora_vl.report.plots import Plot
from milora_vl.report.tables import Table


@dataclass(frozen=True, slots=True)
class Analysis:
    """The table of means, and (plot, caption) of each figure."""

    table: Table
    figures: list[tuple[Plot, str]]


def read_analysis(run: Path) -> Analysis | None:
    """Return the analysis of a run; None where there is none. UserError for a file that cannot be parsed."""
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
            f"{file}: cannot be read: {error}\nmove {file.parent} away to have a report without it"
        ) from error
