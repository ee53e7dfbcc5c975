"""Write the files of a study: an HTML page as for a sweep, and its section of a page in docs/studies."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from milora_data.command.atomic_write import write_text
from milora_data.errors import UserError
from milora_vl.report.plots import PlotStyle, draw, png, write_csv
from milora_vl.report.tables import Table
from milora_vl.studies import decay, plots
from milora_vl.studies.runner import Folder, all_cells, finished
from milora_vl.studies.study import Study
from milora_vl.studies.tasks import load_task, task_class
from milora_vl.sweep import page
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.plots import curves_figure, scores_figure
from milora_vl.sweep.results import Arm, Result, arms, mean_of

# Optional columns of cells.csv, with their headings.
_MORE = {"forgetting_pictures": "of pictures", "update": "‖ΔW‖/‖W‖", "overlap": "overlap with top"}


def write(folder: Folder, command: str) -> tuple[Path, Table]:
    """Write sweep.html, cells.csv and the figures; return the path of the page and the table of arms."""
    study, cells = folder.study, all_cells(folder)
    results = finished(cells, folder)
    failed = {cell: failure for cell in cells if (failure := folder.failure(cell)) is not None}

    def answers(cell: Cell) -> Mapping[str, tuple[float, str]]:
        return {item: (score, item) for item, score in folder.items(cell).items()}

    task, title = task_class(study.task), f"{study.question} ({study.task})"
    cells_are = "Every cell is a file in cells/ with the scores of its test items"
    written, _ = page.write(
        page.Compared(
            folder.path,
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
    if decay.NONE in study.arms:
        _write_layers(folder, results)
    return written, table(study, results)


def _write_layers(folder: Folder, results: Mapping[Cell, Result]) -> None:
    """Write layers.csv, correlations.csv and their figure for a study with one arm per layer.

    Writes nothing if the cells of `none`, or the cells of all layers, have failed.
    """
    study = folder.study
    ready = {arm.label for arm in arms(results, study.seeds) if arm.best}
    if decay.NONE not in ready or len(ready) == 1:
        return
    layers = decay.layers(load_task(study.task).model(), results, study.seeds, study.overlap or 16)
    for name, rows in (("layers", layers), ("correlations", decay.correlations(layers))):
        write_csv(folder.path / f"{name}.csv", list(asdict(rows[0])), [list(asdict(row).values()) for row in rows])
    caption = "Help over decay, one point per layer."
    draw(folder.path, "layers", partial(plots.layers_figure, layers), caption, with_pdf=True)


def table(study: Study, results: Mapping[Cell, Result]) -> Table:
    """Return a table with one row per arm at its best learning rate: means ± half a 95 % interval over seeds."""
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
    at_best = [
        r for cell, r in results.items() if cell.arm == (best.method, None) and cell.learning_rate == best.learning_rate
    ]
    rate = f"{best.learning_rate:g}" + (" (edge)" if arm.at_edge else "")
    others = [mean_of([float(result[key]) for result in at_best]).text for key in more]
    trained = f"{round(sum(int(float(r['trainable'])) for r in at_best) / len(at_best)):,}"
    return (arm.label, rate, best.validation.text, best.score.text, best.forgetting.text, *others, trained)


def document(name: str, folder: Folder, docs: Path) -> Path:
    """Write the results into the page of the question in `docs`: the cells as CSV, the figures, and the table.

    Raises UserError if the page has no marker for them, or if a result is missing.
    """
    file = docs / f"{name.partition('.')[0]}.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if f"<!-- results: {name} -->" not in text:
        raise UserError(
            f"no line  <!-- results: {name} -->  (up to  <!-- end -->)", code="study-page-marker", where=str(file)
        )
    if decay.NONE in folder.study.arms:
        files = {".csv": "cells.csv", ".layers.csv": "layers.csv", ".correlations.csv": "correlations.csv"}
        files |= {".png": "layers.png"}
    elif folder.study.reference:
        files = {".csv": "cells.csv"}
    else:
        files = {".csv": "cells.csv", ".png": "pareto.png"}
    missing = [source for source in files.values() if not (folder.path / source).is_file()]
    if missing:
        raise UserError(
            f"{folder.path} has no {missing[0]}: cells have failed or have not run",
            code="study-incomplete",
            hint="run the study first, with --retry for failed cells",
        )
    for suffix, source in files.items():
        shutil.copyfile(folder.path / source, docs / f"{name}{suffix}")
    if folder.study.reference:
        draw_curves(name, folder.study, docs)
    write_text(file, documented(text, name, folder.study, docs))
    return file


def redraw(name: str, study: Study, docs: Path) -> Path:
    """Write the figures and the table of a study into `docs` again, from the CSV file there. Return the page.

    Raises UserError if `docs` has no such file, or if the study is not read from curves.
    """
    file = docs / f"{name.partition('.')[0]}.md"
    if study.reference is None or not (docs / f"{name}.csv").is_file():
        raise UserError(
            f"--redraw needs the file {docs / name}.csv and a study with a reference, such as curves.minilm",
            code="study-redraw",
            where=name,
        )
    draw_curves(name, study, docs)
    write_text(file, documented(file.read_text(encoding="utf-8"), name, study, docs))
    return file


def draw_curves(name: str, study: Study, docs: Path) -> None:
    """Draw NAME.png, forgetting over loss, and NAME.score.png, score over forgetting, from NAME.csv in `docs`."""
    assert study.reference is not None
    cells, task = read_cells(docs / f"{name}.csv"), task_class(study.task)
    panels = page.panels(cells, list(cells), study.seeds, task.forgets)
    style = PlotStyle()
    (docs / f"{name}.png").write_bytes(png(curves_figure(panels, study.reference, style)))
    scores = scores_figure(panels[0].arms, task.metric, task.forgets, style)
    (docs / f"{name}.score.png").write_bytes(png(scores))


def documented(text: str, name: str, study: Study, docs: Path) -> str:
    """Return the text of a page in `docs` with the results of one study, read from the CSV files in `docs`."""
    figure = "forgetting over validation loss" if study.reference else "score over forgetting"
    if decay.NONE in study.arms:
        figure = "help over decay"
    return with_block(text, name, shown(name, study, docs), f"{figure}, {study.task}")


def shown(name: str, study: Study, docs: Path) -> Table:
    """Return the table of a study for its page in `docs`, read from the CSV files there."""
    if study.reference:
        at_equal_loss = page.equal_loss_table(read_cells(docs / f"{name}.csv"), study.reference)
        assert at_equal_loss is not None
        return at_equal_loss
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
    """Return the text of a page with a new block for one study: its table, its caption and its figure."""
    start = f"<!-- results: {name} -->"
    before, _, from_block = text.partition(start)
    _, _, after = from_block.partition("<!-- end -->")
    shown_figure = f"\n\n![{figure}]({name}.png)" if figure else ""
    return f"{before}{start}\n{markdown(filled)}\n\n{filled.caption}{shown_figure}\n<!-- end -->{after}"


def markdown(whole: Table) -> str:
    """Return a table as Markdown."""
    lines = [whole.header, ["---"] * len(whole.header), *whole.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_cells(file: Path) -> dict[Cell, dict[str, Any]]:
    """Return the cells and their numbers from cells.csv."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    return {
        Cell(
            row["method"],
            float(row["learning_rate"]),
            None,
            int(row["seed"]),
            int(row["steps"]) if row.get("steps") else None,
        ): row
        for row in rows
    }
