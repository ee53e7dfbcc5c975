"""Write report.html of a run from its files, with all pictures and plots; again after a command has added files."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_data.pictures.files import data_uri
from milora_vl.common.cli import page as pages
from milora_vl.common.cli.table import Table
from milora_vl.common.errors import UserError
from milora_vl.report import figures, parts, run_page, tables, wording
from milora_vl.report.plots import Plot
from milora_vl.report.repeat import commands, steps
from milora_vl.report.run_page import Run

# CSS class (base.css) for each of the four outcomes of a question.
_OUTCOME_CLASS = {
    "right before and after": "kept",
    "newly right": "gained",
    "no longer right": "lost",
    "wrong before and after": "never",
}


@dataclass(frozen=True, slots=True)
class Analysis:
    """What `python -m milora_vl.analyze` wrote: the table of means, and (plot, caption) of each figure."""

    table: Table
    figures: list[tuple[Plot, str]]


def write_report(folder: Path) -> Path:
    """Write report.html and plots/ into a run folder, replacing older ones, and return the path of the page.

    Raises UserError if the folder contains no file of a run, or if a file cannot be parsed.
    """
    return write_page(run_page.read_run(folder))


def write_page(content: Run) -> Path:
    """Write the page and the plots of `content` and return the path of the page."""
    page = content.folder / "report.html"
    pages.write(page, render(content))
    return page


def render(content: Run) -> str:
    """Write the plots and return the page as HTML. All text from the files of the run is escaped."""
    return pages.render(Path(__file__).with_name("report.html.j2"), _content(content))


def _content(content: Run) -> dict[str, Any]:
    """Return the variables of the template."""
    plots = figures.make(content)
    measured = [lost for comparison in content.comparisons if (lost := wording.forgetting(comparison))]
    recipe, typed = content.folder / "recipe.yaml", commands(content)
    return {
        "title": wording.title(content),
        "lede": wording.summary(content),
        "facts": parts.facts(content),
        "suites": parts.suites(content, list(plots)),
        "earlier": tables.earlier_table(content),
        "outcome_class": _OUTCOME_CLASS,
        "gallery": parts.gallery(content),
        "forgetting": measured[0] if measured else None,
        "forgetting_words": wording.forgetting_words(content),
        "suite_words": wording.suite_words(content),
        "forgetting_table": tables.forgetting_table(content.forgetting),
        "score_changes": wording.score_changes(content.forgetting),
        "analysis": read_analysis(content.folder),
        "plots": plots,
        "loss_words": wording.loss_words(content),
        "tasks": tables.tasks_table(content),
        "policy": tables.policy_table(content),
        "protection": tables.protection_table(content),
        "protection_words": wording.PROTECTION,
        "spectrum_words": wording.spectrum_words(content),
        "layers": [wording.layer_words(layer) for layer in content.bands],
        "commands": typed,
        "versions": parts.versions(content),
        "steps": steps(typed),
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        "credits": parts.credits_of(content),
    }


def read_analysis(run: Path) -> Analysis | None:
    """Return the analysis in a run folder, or None without one."""
    folder = run / "analysis"
    if not (folder / "summary.json").is_file():
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    figures = [(figure["name"], figure["caption"]) for figure in summary["figures"]]
    drawn = [
        (Plot(data_uri((folder / f"{name}.png").read_bytes(), "image/png"), caption), caption)
        for name, caption in figures
    ]
    return Analysis(Table(**summary["table"]), drawn)


def try_write_report(run: Path, warn: Callable[[str], object]) -> Path | None:
    """Write report.html of a run and return its path. On any error, warn and return None: the results must not fail."""
    try:
        return write_report(run)
    except (UserError, OSError) as error:  # for example a full disk
        warn(f"no report: {error}")
    except Exception:
        warn(f"no report; run python -m milora_vl.report {run} to see why\n{traceback.format_exc(limit=1)}")
    return None


def regenerate_report(folder: Path) -> None:
    """Regenerate the report if `folder` is a run folder, and print its path or the reason of failure on stderr."""
    if (folder / "recipe.yaml").is_file():
        page = try_write_report(folder, lambda text: sys.stderr.write(f"{text}\n"))
        sys.stderr.write(f"report:  {page}\n" if page is not None else "")
