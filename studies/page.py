"""Write the files of a study: an HTML page as for a sweep, and its section of a page in docs/studies."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.table import Table
from milora_vl.common.errors import UserError
from milora_vl.report.plots import png, write_csv
from milora_vl.sweep import page
from milora_vl.sweep.cells import Cell, CellNumbers
from milora_vl.sweep.curves import (
    Ratio,
    about_pictures,
    equal_loss_table,
    ratio_texts,
    ratios_to,
)
from milora_vl.sweep.page import ratios_figure, score_figure
from milora_vl.sweep.results import Arm, arms, mean_of
from studies.runner import Folder, all_cells, finished
from studies.study import Study, chosen, read_study
from studies.tasks import task_class

_FEW = 4  # a table alone shows fewer arms
_ABOUT_PICTURES = "KL on answers about pictures, nats per token"
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
    return written, chains_table(study, results) if study.then else table(study, results)


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
    """Write the finished cells of a study into its CSV file in `docs`, and the page of the question from the CSV files.

    Rows of arms that have no finished cell stay: their code may be gone. Raises UserError if the page has no marker.
    """
    cells = finished(all_cells(folder), folder)
    file = docs / f"{name}.csv"
    ran = {cell.method for cell in cells}
    before = read_cells(file).values() if file.is_file() else ()
    rows: list[CellNumbers] = [*(row for row in before if row["method"] not in ran), *cells.values()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if cells:
        write_csv(file, columns, [[row.get(key) for key in columns] for row in rows])
    return redraw(name, folder.study, docs)


def redraw(name: str, study: Study, docs: Path) -> Path:
    """Write the figures and the table of a study into `docs`, from the CSV files there. Return the page."""
    question = name.partition(".")[0]
    file = docs / f"{question}.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    marked = question if _start(question) in text else name
    if _start(marked) not in text:
        raise UserError(
            f"no line  {_start(name)}  (up to  <!-- end -->)",
            code="study-page-marker",
            where=str(file),
            hint="write the two comment lines into the page, where the tables belong",
        )
    write_text(file, documented(text, name, study, docs))
    if study.then:
        return file
    title, references = f"{study.question} ({study.task}, {study.steps} steps)", {study.reference}
    panels = ratios_to(study.reference, cells_of(name, study, docs))
    if marked == question:
        found = _ratios_of(question, docs)
        title, references = study.question, {each.reference for each, _ in found}
        panels = {each.task: ratios for each, ratios in found}
    if len({arm for ratios in panels.values() for arm in ratios}) >= _FEW:
        (docs / f"{marked}.png").write_bytes(png(ratios_figure(panels, references, title)))
    if study.figure is not None:
        _draw_scores(docs / f"{name}.score.png", cells_of(name, study, docs), study)
    return file


def _draw_scores(file: Path, cells: Mapping[Cell, Mapping[str, Any]], study: Study) -> None:
    """Draw score over forgetting; vision-language tasks have a second panel about pictures."""
    assert study.figure is not None
    task = task_class(study.task)
    shown = {cell: row for cell, row in cells.items() if cell.method in study.figure.arms}
    panels = {task.forgets: arms(shown, study.seeds)}
    if pictures := about_pictures(shown):
        panels[_ABOUT_PICTURES] = arms(pictures, study.seeds)
    file.write_bytes(png(score_figure(panels, task.metric, study.figure.title)))


def _ratios_of(question: str, docs: Path) -> list[tuple[Study, dict[str, Ratio | None]]]:
    """Return the studies of a question that have a CSV file in `docs`, and the ratio of each arm to the reference.

    Seeds that ran with one rate are left out, and so are pictures.
    """
    found = []
    for name in chosen(question):
        study = read_study(name)
        if (docs / f"{name}.csv").is_file():
            cells = cells_of(name, study, docs)
            searched = {cell: row for cell, row in cells.items() if cell.seed < (study.search_seeds or study.seeds)}
            found.append((study, next(iter(ratios_to(study.reference, searched).values()))))
    return found


def question_table(found: Sequence[tuple[Study, Mapping[str, Ratio | None]]]) -> Table:
    """Return a table of all tasks of a question: one row per arm, and its ratio to the reference at equal loss."""
    columns = [ratio_texts(ratios, study.reference) for study, ratios in found]
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = tuple((label, *(column.get(label, "") for column in columns)) for label in labels)
    seeds = ", ".join(f"{study.task} {study.search_seeds or study.seeds}" for study, _ in found)
    caption = (
        "Forgetting relative to the reference (1), at [equal loss](index.md#how-they-are-read). "
        f"Seeds: {seeds}. ≥: a lower bound."
    )
    return Table(("arm", *(study.task for study, _ in found)), rows, caption)


def _start(marked: str) -> str:
    return f"<!-- results: {marked} -->"


def documented(text: str, name: str, study: Study, docs: Path) -> str:
    """Return the text of a page in `docs` with the results of a study, read from the CSV files in `docs`.

    A page either has a marker for each study, or one for its question, whose table and figure have all its tasks.
    """
    question = name.partition(".")[0]
    if _start(question) in text:
        return with_block(text, question, question_table(_ratios_of(question, docs)))
    if study.then:
        return with_block(text, name, chains_table(study, cells_of(name, study, docs)), figure=False)
    table = equal_loss_table(cells_of(name, study, docs), study.reference)
    assert table is not None
    return with_block(text, name, table)


def with_block(text: str, name: str, filled: Table, *, figure: bool = True) -> str:
    """Return the text of a page with a new block for one study: its table, and its figure unless it has few arms."""
    start = _start(name)
    before, _, from_block = text.partition(start)
    _, _, after = from_block.partition("<!-- end -->")
    drawn = f"\n![Forgetting at equal loss]({name}.png)\n" if figure and len(filled.rows) >= _FEW else ""
    return f"{before}{start}\n{filled.markdown()}{drawn}<!-- end -->{after}"


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
