"""The files of a study: an HTML page as a sweep has it, and its part of a page in docs/studies."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from milora_data.errors import UserError
from milora_data.whole import write_text
from milora_vl.report.plots import draw, write_csv
from milora_vl.report.tables import Table
from milora_vl.studies import decay, plots
from milora_vl.studies.runner import Folder, all_cells, finished
from milora_vl.studies.study import Study
from milora_vl.studies.tasks import load_task, task_class
from milora_vl.sweep import page
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.results import Arm, Result, arms, mean_of

# What cells.csv holds beside what every cell has, with a heading for it.
_MORE = {"forgetting_pictures": "of pictures", "update": "‖ΔW‖/‖W‖", "overlap": "overlap with top"}


def write(folder: Folder, command: str) -> tuple[Path, Table]:
    """Write sweep.html, cells.csv and the figures; returns the page and the table of arms."""
    study, cells = folder.study, all_cells(folder)
    results = finished(cells, folder)
    failed = {cell: failure for cell in cells if (failure := folder.failure(cell)) is not None}

    def answers(cell: Cell) -> Mapping[str, tuple[float, str]]:
        return {item: (score, item) for item, score in folder.items(cell).items()}

    task, title = task_class(study.task), f"{study.question} ({study.task})"
    kept = "Every cell with the scores of its test items is a file in cells/"
    written, _ = page.write(
        page.Compared(
            folder.path, title, cells, results, failed, answers, study.seeds, task.metric, task.forgets, command, kept
        )
    )
    if decay.NONE in study.arms:
        _write_layers(folder, results)
    return written, table(study, results)


def _write_layers(folder: Folder, results: Mapping[Cell, Result]) -> None:
    """Write layers.csv and correlations.csv of a study with an arm for each layer, and their figure.

    Nothing where the cells of `none`, or those of all layers, have failed.
    """
    study = folder.study
    ready = {arm.label for arm in arms(results, study.seeds) if arm.best}
    if decay.NONE not in ready or len(ready) == 1:
        return
    found = decay.layers(load_task(study.task).model(), results, study.seeds, study.overlap or 16)
    for name, rows in (("layers", found), ("correlations", decay.correlations(found))):
        write_csv(folder.path / f"{name}.csv", list(asdict(rows[0])), [list(asdict(row).values()) for row in rows])
    draw(folder.path, "layers", partial(plots.layers_figure, found), "Help over decay, a point a layer.", with_pdf=True)


def table(study: Study, results: Mapping[Cell, Result]) -> Table:
    """One row an arm, at its learning rate by validation loss: means ± half a 95 % interval over seeds."""
    more = [key for key in _MORE if any(result.get(key) not in (None, "") for result in results.values())]
    header = (
        "arm",
        "learning rate",
        "validation loss",
        "score",
        "forgetting",
        *(_MORE[key] for key in more),
        "trained",
    )
    rows = [_row(arm, results, more, study.seeds) for arm in arms(results, study.seeds)]
    return Table(header, tuple(rows), f"± is half a 95 % interval over {study.seeds} seeds (Student’s t).")


def _row(arm: Arm, results: Mapping[Cell, Result], more: Sequence[str], seeds: int) -> tuple[str, ...]:
    if arm.best is None:
        return (arm.label, f"no rate with {seeds} seeds", *["–"] * (4 + len(more)))
    best = arm.best
    own = [
        r for cell, r in results.items() if cell.arm == (best.method, None) and cell.learning_rate == best.learning_rate
    ]
    rate = f"{best.learning_rate:g}" + (" (edge)" if arm.at_edge else "")
    others = [mean_of([float(result[key]) for result in own]).text for key in more]
    trained = f"{round(sum(int(float(r['trainable'])) for r in own) / len(own)):,}"
    return (arm.label, rate, best.validation.text, best.score.text, best.forgetting.text, *others, trained)


def document(name: str, folder: Folder, docs: Path) -> Path:
    """Put the results into the question's page of `docs`: the cells as CSV, the figure, and the table in its text.

    Raises UserError where the page has no place for them, and where a result is not there.
    """
    file = docs / f"{name.partition('.')[0]}.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if f"<!-- results: {name} -->" not in text:
        raise UserError(f"{file} has no line  <!-- results: {name} -->  (up to  <!-- end -->)")
    if decay.NONE in folder.study.arms:
        files = {".csv": "cells.csv", ".layers.csv": "layers.csv", ".correlations.csv": "correlations.csv"}
        files |= {".png": "layers.png"}
    else:
        files = {".csv": "cells.csv", ".png": "pareto.png"}
    missing = [source for source in files.values() if not (folder.path / source).is_file()]
    if missing:
        raise UserError(f"{folder.path} has no {missing[0]}: cells have failed, or have not run")
    for suffix, source in files.items():
        shutil.copyfile(folder.path / source, docs / f"{name}{suffix}")
    write_text(file, documented(text, name, folder.study, docs))
    return file


def documented(text: str, name: str, study: Study, docs: Path) -> str:
    """A page of `docs` with the results of one study as the CSV files there have them."""
    figure = "help over decay" if decay.NONE in study.arms else "score over forgetting"
    return with_block(text, name, shown(name, study, docs), f"{figure}, {study.task}")


def shown(name: str, study: Study, docs: Path) -> Table:
    """The table of a study as its page in `docs` shows it, from the CSV files there."""
    if decay.NONE not in study.arms:
        return table(study, read_cells(docs / f"{name}.csv"))

    def signed(text: str) -> str:
        return f"{float(text):+.2f}"

    with (docs / f"{name}.correlations.csv").open(encoding="utf-8", newline="") as opened:
        rows = [
            (
                row["measure"],
                row["kind"],
                signed(row["rho"]),
                f"{signed(row['low'])} to {signed(row['high'])}",
                row["n"],
            )
            for row in csv.DictReader(opened)
        ]
    words = "Spearman’s rank correlation of the measure with how far the layer’s adapter lowers the validation loss."
    return Table(("measure", "layers", "ρ", "95 % interval", "n"), tuple(rows), words)


def with_block(text: str, name: str, filled: Table, figure: str = "") -> str:
    """Return a page's text with the block of one study filled anew: its table, what that says, and its figure."""
    start = f"<!-- results: {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition("<!-- end -->")
    shown_figure = f"\n\n![{figure}]({name}.png)" if figure else ""
    return f"{before}{start}\n{markdown(filled)}\n\n{filled.caption}{shown_figure}\n<!-- end -->{after}"


def markdown(whole: Table) -> str:
    """Return a table as Markdown."""
    lines = [whole.header, ["---"] * len(whole.header), *whole.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_cells(file: Path) -> dict[Cell, dict[str, Any]]:
    """Read cells.csv back."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    return {Cell(row["method"], float(row["learning_rate"]), None, int(row["seed"])): row for row in rows}
