"""Write the files of a study: an HTML page as for a sweep, and its CSV file and figure in docs/studies."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from milora_vl.common.cli.table import Table
from milora_vl.core.policy.rules import label_of
from milora_vl.report.plots import png, write_csv
from milora_vl.sweep import page
from milora_vl.sweep.cells import Cell, CellNumbers
from milora_vl.sweep.curves import about_pictures
from milora_vl.sweep.page import score_figure
from milora_vl.sweep.results import arms, mean_of
from studies.runner import Folder
from studies.study import Study
from studies.tasks import task_class

_ABOUT_PICTURES = "KL on answers about pictures, nats per token"


def write(folder: Folder, command: str) -> tuple[Path, Table]:
    """Write sweep.html, cells.csv and the figures; return the path of the page and the table of arms."""
    study, cells, results = folder.study, folder.study.cells(), folder.finished()
    failed = {cell: failure for cell in cells if (failure := folder.failure(cell)) is not None}

    def answers(cell: Cell) -> Mapping[str, tuple[float, str, str]]:
        return {item: (score, item, "") for item, score in folder.items(cell).items()}

    task, title = task_class(study.task), f"{study.question} ({study.task})"
    cells_are = "Every cell is a file in cells/ with the scores of its test items"
    written, _ = page.write(
        page.Compared(
            folder.folder,
            title,
            cells,
            results,
            failed,
            answers,
            study.seeds,
            task.metric,
            task.forgets,
            command,
            study.reference,
            cells_are,
        )
    )
    return written, chains_table(study, results) if study.then else table(study, results)


def table(study: Study, results: Mapping[Cell, CellNumbers]) -> Table:
    """Return a table with one row per arm at its best learning rate: means ± half a 95 % interval over seeds."""
    header = ("arm", "learning rate", "validation loss", "score", "forgetting", "trained")
    rows = []
    for arm in arms(results, study.seeds):
        if arm.best is None:
            rows.append((arm.label, f"no rate with {study.seeds} seeds", *["–"] * 4))
            continue
        best = arm.best
        of_best = [r for c, r in results.items() if (c.method, c.learning_rate) == (best.method, best.learning_rate)]
        trained = fmean(int(float(row["trainable"])) for row in of_best)
        rate = f"{best.learning_rate:g}" + (" (edge)" if arm.at_edge else "")
        numbers = (best.validation.text, best.score.text, best.forgetting.text, f"{round(trained):,}")
        rows.append((arm.label, rate, *numbers))
    return Table(header, tuple(rows), f"± is half a 95 % interval over {study.seeds} seeds (Student’s t).")


def chains_table(study: Study, results: Mapping[Cell, CellNumbers]) -> Table:
    """Return a table with one row per arm of a study with chains: means over its seeds, ± half a 95 % interval."""
    tasks = [study.task, *study.then]
    after = [(i, j) for i in range(1, len(tasks) + 1) for j in range(i, len(tasks) + 1)]
    keys = [f"score_{j}_{i}" for i, j in after] + ["average", "score", "backward", "forgetting"]
    header = ("arm", "seeds", *(f"{i} after {j}" for i, j in after), "average", "last", "backward", "text")
    rows = []
    for arm in dict.fromkeys(cell.method for cell in results):
        of_arm = [row for cell, row in results.items() if cell.method == arm]
        columns = [[float(row[key]) for row in of_arm if row.get(key) not in (None, "")] for key in keys]
        means = [mean_of(values).text if values else "–" for values in columns]
        rows.append((arm, str(len(of_arm)), *means))
    named = "; ".join(f"{i}: {name}" for i, name in enumerate(tasks, start=1))
    caption = f"Tasks: {named}. 1 after 3 is the score of the first task after the third. ± is half a 95 % interval."
    return Table(header, tuple(rows), caption)


def document(name: str, folder: Folder, docs: Path) -> Path:
    """Write the finished cells of a study into its CSV file in `docs`, and its figure. Return the file.

    Rows of cells that are not finished here stay: their code may be gone, or another machine has run them.
    """
    cells = folder.finished()
    file = docs / f"{name}.csv"
    before = read_cells(file) if file.is_file() else {}
    rows: list[CellNumbers] = [*(row for cell, row in before.items() if cell not in cells), *cells.values()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if cells:
        write_csv(file, columns, [[row.get(key) for key in columns] for row in rows])
    if folder.study.figure is not None:
        _draw_scores(docs / f"{name}.score.png", cells_of(name, folder.study, docs), folder.study)
    return file


def _draw_scores(file: Path, cells: Mapping[Cell, Mapping[str, Any]], study: Study) -> None:
    """Draw score over forgetting; vision-language tasks have a second panel about pictures."""
    assert study.figure is not None
    task = task_class(study.task)
    shown = {cell: row for cell, row in cells.items() if cell.method in study.figure.arms}
    panels = {
        about: [replace(arm, label=label_of(arm.label)) for arm in arms(results, study.seeds)]
        for about, results in ((task.forgets, shown), (_ABOUT_PICTURES, about_pictures(shown)))
        if results
    }
    file.write_bytes(png(score_figure(panels, task.metric, study.figure.title)))


def cells_of(name: str, study: Study, docs: Path) -> dict[Cell, dict[str, Any]]:
    """Return the cells of a study from `docs`, and cells of other studies that it names."""
    cells: dict[Cell, dict[str, Any]] = {}
    for other, arms_of_it in study.also.items():
        cells |= {cell: row for cell, row in read_cells(docs / f"{other}.csv").items() if cell.method in arms_of_it}
    return cells | read_cells(docs / f"{name}.csv")


def read_cells(file: Path) -> dict[Cell, dict[str, Any]]:
    """Return the cells and their numbers from cells.csv."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    return {Cell(row["method"], float(row["learning_rate"]), None, int(row["seed"])): row for row in rows}
