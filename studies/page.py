"""Write the files of a study: an HTML page as for a sweep, and its section of a page in docs/studies."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_vl.base.atomic_write import write_text
from milora_vl.base.errors import UserError
from milora_vl.report.plots import PlotStyle, draw, png, styled, write_csv
from milora_vl.report.tables import Table
from milora_vl.sweep import page
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.curves import at_common_loss, curves_of
from milora_vl.sweep.plots import Panel, colour_of, curves_figure, mark_of, scores_figure
from milora_vl.sweep.results import Arm, Result, arms, mean_of
from studies import decay
from studies.runner import Folder, all_cells, finished
from studies.study import Study, chosen, read_study
from studies.tasks import load_task, task_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    draw(folder.path, "layers", partial(layers_figure, layers), caption, with_pdf=True)


def layers_figure(layers: Sequence[decay.Layer], style: PlotStyle) -> Figure:
    """Draw how much each layer's adapter helps over the decay of its spectrum, with one marker per kind of layer."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    with styled(style):
        figure = Figure(figsize=(style.width, 4.2), layout="constrained")
        axis = figure.subplots()
        for place, kind in enumerate(kinds):
            of_kind = [layer for layer in layers if layer.kind == kind]
            axis.plot(
                [layer.decay for layer in of_kind], [layer.help for layer in of_kind], ls="", ms=7,
                marker=mark_of(place), color=colour_of(place, style), label=kind,
            )  # fmt: skip
        axis.set(xlabel="decay exponent of the spectrum", ylabel="validation loss saved by the layer’s adapter alone")
        figure.legend(loc="outside upper left", ncols=2 if style.narrow else 4, handletextpad=0.2)
    return figure


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
    if not any(_start(marked) in text for marked in (name, file.stem)):
        raise UserError(
            f"no line  {_start(name)}  (up to  <!-- end -->)",
            code="study-page-marker",
            where=str(file),
            hint="write the two comment lines into the page, where the tables belong",
        )
    files = {".csv": "cells.csv"}
    if decay.NONE in folder.study.arms:
        files |= {".layers.csv": "layers.csv", ".correlations.csv": "correlations.csv", ".png": "layers.png"}
    missing = [source for source in files.values() if not (folder.path / source).is_file()]
    if missing:
        raise UserError(
            f"{folder.path} has no {missing[0]}: cells have failed or have not run",
            code="study-incomplete",
            hint="run the study first, with --retry for failed cells",
        )
    for suffix, source in files.items():
        shutil.copyfile(folder.path / source, docs / f"{name}{suffix}")
    return redraw(name, folder.study, docs)


def redraw(name: str, study: Study, docs: Path) -> Path:
    """Write the figures and the table of a study into `docs` again, from the CSV files there. Return the page.

    Raises UserError if `docs` has no such file.
    """
    file = docs / f"{name.partition('.')[0]}.md"
    if not (docs / f"{name}.csv").is_file():
        raise UserError(
            f"no file {docs / name}.csv",
            code="study-redraw",
            where="--redraw",
            hint=f"run the study first:  python -m studies {name} --docs {docs}",
        )
    text = file.read_text(encoding="utf-8")
    if _start(file.stem) in text and study.reference is not None:
        panels = [_task_panel(found) for found in _studies_of(file.stem, docs)]
        (docs / f"{file.stem}.png").write_bytes(png(curves_figure(panels, PlotStyle())))
    elif study.reference is not None:
        _draw_curves(name, study, study.reference, docs)
    write_text(file, documented(text, name, study, docs))
    return file


def _draw_curves(name: str, study: Study, reference: str, docs: Path) -> None:
    """Draw NAME.png, forgetting over loss, and NAME.score.png, score over forgetting, from NAME.csv in `docs`."""
    cells, task = read_cells(docs / f"{name}.csv"), task_class(study.task)
    panels = page.panels(cells, list(cells), study.seeds, task.forgets, reference)
    style = PlotStyle()
    (docs / f"{name}.png").write_bytes(png(curves_figure(panels, style)))
    scores = scores_figure(panels[0].arms, task.metric, task.forgets, style)
    (docs / f"{name}.score.png").write_bytes(png(scores))


@dataclass(frozen=True, slots=True)
class _Read:
    """The cells of one task of a question, from `docs`. Seeds that ran with one rate are left out."""

    study: Study
    reference: str
    cells: Mapping[Cell, dict[str, Any]]


def _studies_of(question: str, docs: Path) -> list[_Read]:
    """Return the studies of a question that have a CSV file in `docs` and a reference."""
    found = []
    for name in chosen(question):
        study, file = read_study(name), docs / f"{name}.csv"
        if study.reference is not None and file.is_file():
            seeds = study.search_seeds or study.seeds
            cells = {cell: result for cell, result in read_cells(file).items() if cell.seed < seeds}
            found.append(_Read(study, study.reference, cells))
    return found


def _task_panel(found: _Read) -> Panel:
    return Panel(
        "forgetting", arms(found.cells, found.study.seeds), curves_of(found.cells), found.reference, found.study.task
    )


def question_table(found: Sequence[_Read]) -> Table:
    """Return a table of all tasks of a question: one row per arm, and its ratio to the reference at equal loss."""
    columns = []
    for one in found:
        curves = curves_of(one.cells)
        ratios = {label: at_common_loss(fronts, curves[one.reference]) for label, fronts in curves.items()}
        columns.append({label: "1" if label == one.reference else r.text if r else "–" for label, r in ratios.items()})
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = tuple((label, *(column.get(label, "") for column in columns)) for label in labels)
    seeds = ", ".join(f"{one.study.task} {one.study.search_seeds or one.study.seeds}" for one in found)
    caption = (
        "What an arm forgets, divided by what the reference (1) forgets, both read at the lowest validation loss that "
        "both reach with the same seed. Seeds with several learning rates, which a curve needs: "
        f"{seeds}. One seed has no interval; several have 95 % intervals (Student’s t on the logarithms). "
        "≥: in some seed the arm ends above the losses that the reference was trained to, and a lower rate of the "
        "reference might forget less there."
    )
    return Table(("arm", *(one.study.task for one in found)), rows, caption)


def _start(marked: str) -> str:
    return f"<!-- results: {marked} -->"


def documented(text: str, name: str, study: Study, docs: Path) -> str:
    """Return the text of a page in `docs` with the results of a study, read from the CSV files in `docs`.

    A page either has a marker for each study, or one for its question, whose table and figure have all its tasks.
    """
    question = name.partition(".")[0]
    if decay.NONE in study.arms:
        return with_block(text, question, correlations_table(question, docs))
    if _start(question) in text:
        return with_block(text, question, question_table(_studies_of(question, docs)), _CURVES)
    return with_block(text, name, shown(name, study, docs), f"{_CURVES}, {study.task}")


def shown(name: str, study: Study, docs: Path) -> Table:
    """Return the table of a study with a reference for its page in `docs`, read from the CSV file there."""
    assert study.reference is not None
    at_equal_loss = page.equal_loss_table(read_cells(docs / f"{name}.csv"), study.reference)
    assert at_equal_loss is not None
    return at_equal_loss


def correlations_table(question: str, docs: Path) -> Table:
    """Return the rank correlations over all layers of each task of a study with one arm per layer."""
    columns = {}
    for name in chosen(question):
        file = docs / f"{name}.correlations.csv"
        if file.is_file():
            with file.open(encoding="utf-8", newline="") as opened:
                rows = [row for row in csv.DictReader(opened) if row["kind"] == "all"]
            column = {row["measure"]: [float(row[key]) for key in ("rho", "low", "high")] for row in rows}
            columns[f"{read_study(name).task} ({rows[0]['n']})"] = {
                measure: f"{rho:+.2f} ({low:+.2f} to {high:+.2f})" for measure, (rho, low, high) in column.items()
            }
    words = (
        "Spearman’s rank correlation of the measure with how far the adapter of a matrix alone lowers the validation "
        "loss, over all matrices of the task (their number), with its 95 % bootstrap interval."
    )
    rows_of = tuple((measure, *(texts[measure] for texts in columns.values())) for measure in decay.MEASURES)
    return Table(("measure", *columns), rows_of, words)


def with_block(text: str, name: str, filled: Table, figure: str = "") -> str:
    """Return the text of a page with a new block for one study: its table, its caption and its figure."""
    start = _start(name)
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
