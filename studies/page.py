"""Write the files of a study: an HTML page as for a sweep, and its section of a page in docs/studies."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.table import Table
from milora_vl.common.errors import UserError
from milora_vl.report.plots import png
from milora_vl.sweep import page
from milora_vl.sweep.cells import Cell, CellNumbers
from milora_vl.sweep.curves import about_pictures, at_common_loss, curves_of
from milora_vl.sweep.plots import Panel, curves_figure, pareto_figure
from milora_vl.sweep.results import Arm, arms, mean_of
from studies.runner import Folder, all_cells, finished
from studies.study import Study, chosen, read_study
from studies.tasks import task_class

_CURVES = "forgetting over validation loss"
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
    return written, table(study, results)


def table(study: Study, results: Mapping[Cell, CellNumbers]) -> Table:
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


def _row(arm: Arm, results: Mapping[Cell, CellNumbers], more: Sequence[str], seeds: int) -> tuple[str, ...]:
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

    Raises UserError if the page has no marker for them.
    """
    file = docs / f"{name.partition('.')[0]}.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not any(_start(marked) in text for marked in (name, file.stem)):
        raise UserError(
            f"no line  {_start(name)}  (up to  <!-- end -->)",
            code="study-page-marker",
            where=str(file),
            hint="write the two comment lines into the page, where the tables belong",
        )
    shutil.copyfile(folder.path / "cells.csv", docs / f"{name}.csv")
    return redraw(name, folder.study, docs)


def redraw(name: str, study: Study, docs: Path) -> Path:
    """Write the figures and the table of a study into `docs` again, from the CSV files there. Return the page."""
    file = docs / f"{name.partition('.')[0]}.md"
    text = file.read_text(encoding="utf-8")
    if _start(file.stem) in text:
        panels = [_task_panel(found) for found in _studies_of(file.stem, docs)]
        (docs / f"{file.stem}.png").write_bytes(png(curves_figure(panels)))
    else:
        _draw_curves(name, study, docs)
    write_text(file, documented(text, name, study, docs))
    return file


def _draw_curves(name: str, study: Study, docs: Path) -> None:
    """Draw NAME.png, forgetting over loss, and NAME.score.png, score over forgetting, from NAME.csv in `docs`."""
    cells, task = cells_of(name, study, docs), task_class(study.task)
    if study.figure is not None:
        cells = {cell: row for cell, row in cells.items() if cell.method in study.figure}
    panels = page.panels(cells, list(cells), study.seeds, task.forgets, study.reference)
    (docs / f"{name}.png").write_bytes(png(curves_figure(panels)))
    scores = pareto_figure(panels[0].arms, task.metric, task.forgets)
    (docs / f"{name}.score.png").write_bytes(png(scores))


@dataclass(frozen=True, slots=True)
class _Read:
    """The cells of one task of a question, from `docs`. Seeds that ran with one rate are left out."""

    study: Study
    cells: Mapping[Cell, dict[str, Any]]


def _studies_of(question: str, docs: Path) -> list[_Read]:
    """Return the studies of a question that have a CSV file in `docs`."""
    found = []
    for name in chosen(question):
        study, file = read_study(name), docs / f"{name}.csv"
        if file.is_file():
            seeds = study.search_seeds or study.seeds
            cells = {cell: result for cell, result in cells_of(name, study, docs).items() if cell.seed < seeds}
            found.append(_Read(study, cells))
    return found


def _task_panel(found: _Read) -> Panel:
    study = found.study
    return Panel("forgetting", arms(found.cells, study.seeds), curves_of(found.cells), study.reference, study.task)


def question_table(found: Sequence[_Read]) -> Table:
    """Return a table of all tasks of a question: one row per arm, and its ratio to the reference at equal loss."""
    columns = []
    for one in found:
        curves = curves_of(one.cells)
        ratios = {label: at_common_loss(fronts, curves[one.study.reference]) for label, fronts in curves.items()}
        texts = {label: ratio.text if ratio else "–" for label, ratio in ratios.items()}
        columns.append(texts | {one.study.reference: "1"})
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = tuple((label, *(column.get(label, "") for column in columns)) for label in labels)
    seeds = ", ".join(f"{one.study.task} {one.study.search_seeds or one.study.seeds}" for one in found)
    caption = (
        "Forgetting divided by the reference’s (1), at [equal loss](index.md#how-they-are-read). "
        f"Seeds: {seeds}. ≥: a lower bound."
    )
    return Table(("arm", *(one.study.task for one in found)), rows, caption)


def _start(marked: str) -> str:
    return f"<!-- results: {marked} -->"


def documented(text: str, name: str, study: Study, docs: Path) -> str:
    """Return the text of a page in `docs` with the results of a study, read from the CSV files in `docs`.

    A page either has a marker for each study, or one for its question, whose table and figure have all its tasks.
    """
    question = name.partition(".")[0]
    if _start(question) in text:
        return with_block(text, question, question_table(_studies_of(question, docs)), _CURVES)
    cells = cells_of(name, study, docs)
    filled = page.equal_loss_table(cells, study.reference) if study.second is None else two_references(cells, study)
    assert filled is not None
    return with_block(text, name, filled, f"{_CURVES}, {study.task}")


def two_references(cells: Mapping[Cell, Mapping[str, Any]], study: Study) -> Table:
    """Return a table of all arms with the ratio of forgetting to both references, at equal loss and at equal score."""
    assert study.second is not None
    readings = {"": cells}
    if pictures := about_pictures(cells):
        readings = {" on text": cells, " about pictures": pictures}
    by_loss = curves_of(cells)
    columns = {}
    for about, results in readings.items():
        at_score = {cell: {**row, "validation_loss": 1 - float(row["score"])} for cell, row in results.items()}
        for name, reference in (("loss", study.reference), ("score", study.reference), ("loss", study.second)):
            curves = curves_of(at_score if name == "score" else results)
            columns[f"to {reference} at equal {name}{about}"] = {
                arm: "1"
                if arm == reference
                else ratio.text
                if (ratio := at_common_loss(fronts, curves[reference]))
                else "–"
                for arm, fronts in curves.items()
            }
    lowest = by_loss[study.reference]
    rows = []
    for arm, fronts in by_loss.items():
        of_arm = [row for cell, row in cells.items() if cell.label == arm]
        scores = [max(float(row["score"]) for row in of_arm if int(row["seed"]) == seed) for seed in fronts]
        steps = [float(row["step_seconds"]) for row in of_arm if row.get("step_seconds")]
        reached = sum(front[0].loss <= lowest[seed][0].loss for seed, front in fronts.items() if seed in lowest)
        rows.append((
            arm, mean_of([front[0].loss for front in fronts.values()]).text, mean_of(scores).text,
            *(column[arm] for column in columns.values()), f"{reached} of {len(fronts)}",
            f"{sum(steps) / len(steps):.2f}" if steps else "–",
        ))  # fmt: skip
    caption = (
        "Ratios of forgetting, read at the lowest validation loss (or the highest score) that both reach with the same "
        "seed: geometric means with 95 % intervals (Student’s t on the logarithms). ≥: in some seed the arm ends above "
        f"the losses that the reference was trained to. “Seeds”: how many reach the lowest loss of {study.reference}. "
        "Seconds a step on one core, beside other work."
    )
    return Table(("arm", "lowest loss", "best score", *columns, "seeds", "s a step"), tuple(rows), caption)


def with_block(text: str, name: str, filled: Table, figure: str) -> str:
    """Return the text of a page with a new block for one study: its table, its caption and its figure."""
    start = _start(name)
    before, _, from_block = text.partition(start)
    _, _, after = from_block.partition("<!-- end -->")
    return f"{before}{start}\n{filled.markdown()}\n![{figure}]({name}.png)\n<!-- end -->{after}"


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
