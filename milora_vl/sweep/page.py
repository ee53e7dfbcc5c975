"""The files of a sweep: cells.csv, table.csv, results.json, figures with their CSV, and sweep.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from milora_data.page import render as pages
from milora_data.whole import write_json
from milora_vl.report.plots import draw, write_csv
from milora_vl.report.tables import Table
from milora_vl.sweep import plots
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.results import Answers, Arm, Pair, Result, arms, pairs
from milora_vl.sweep.runner import Sweep

FORGETS = "forgetting on general text, nats a token"
_POINT = ("method", "rank", "learning_rate", "validation", "score", "score_half", "forgetting", "forgetting_half", "n")


@dataclass(frozen=True, slots=True)
class Compared:
    """What a page is about: cells with their results, test items and failures, and the command that repeats it."""

    folder: Path
    title: str
    cells: Sequence[Cell]
    results: Mapping[Cell, Result]
    failed: Mapping[Cell, Result]
    answers: Answers
    seeds: int
    metric: str
    forgets: str
    command: str
    cells_are: str = "Every cell is a run folder in cells/ with a report of its own"


def of_sweep(sweep: Sweep, cells: Sequence[Cell], seeds: int, command: str) -> Compared:
    """What there is of a sweep by now: the cells asked for, and those that earlier commands left in its folder."""
    cells = list(dict.fromkeys([*cells, *sweep.finished({cell.seed for cell in cells})]))
    results = {cell: result for cell in cells if (result := sweep.result(cell)) is not None}
    failed = {cell: failure for cell in cells if (failure := sweep.failure(cell)) is not None}
    metric = next((f"{r['benchmark']}, {r['metric']}" for r in results.values()), "score")
    arms_count = len({cell.arm for cell in results})
    title = f"{arms_count} methods on {sweep.recipe.model}"
    return Compared(sweep.folder, title, cells, results, failed, sweep.answers, seeds, metric, FORGETS, command)


def write(compared: Compared) -> tuple[Path, Table]:
    """Write what the finished cells say; returns the page and the table of methods."""
    found = _in_order(arms(compared.results, compared.seeds), compared.cells)
    tests = pairs(found, compared.answers)
    table = arms_table(found, compared.metric, compared.seeds)
    _files(compared, found, tests, table)
    content = {
        "title": compared.title, "lede": lede(found, compared.metric),
        "done": len(compared.results), "count": len(compared.cells),
        "cells_are": compared.cells_are, "table": table, "tests": pairs_table(tests),
        "figures": _figures(compared, found), "command": compared.command,
        "failed": [(cell.name, failure["said"]) for cell, failure in compared.failed.items()],
        "edges": [arm.label for arm in found if arm.at_edge],
    }  # fmt: skip
    page = compared.folder / "sweep.html"
    pages.write(page, pages.render(Path(__file__).with_name("sweep.html.j2"), content))
    return page, table


def _in_order(found: Sequence[Arm], cells: Sequence[Cell]) -> list[Arm]:
    """The arms as they were asked for, whichever has a result first: the others are compared with the first one."""
    asked = list(dict.fromkeys(cell.arm for cell in cells))
    return sorted(found, key=lambda arm: asked.index((arm.points[0].method, arm.points[0].rank)))


def _figures(compared: Compared, found: Sequence[Arm]) -> list[dict[str, Any]]:
    figures = []
    if found:
        caption = (
            "Up and to the left is better. Open marks are learning rates that validation did not choose; bars are 95 % "
            "intervals over seeds; the grey line joins the points that none beats in both."
        )
        figure = partial(plots.pareto_figure, found, compared.metric, compared.forgets)
        figures.append({"plot": draw(compared.folder, "pareto", figure, caption, with_pdf=True), "caption": caption})
    if any(len(arm.points) > 1 for arm in found):
        caption = "Each method over the learning rates. The validation loss alone decides which one is reported."
        figure = partial(plots.rates_figure, found, compared.metric)
        figures.append({"plot": draw(compared.folder, "rates", figure, caption, with_pdf=True), "caption": caption})
    return figures


def lede(found: Sequence[Arm], metric: str) -> str:
    """The result in a line: the best scores, the highest first."""
    ready = [arm for arm in found if arm.best is not None]
    ready.sort(key=lambda arm: -arm.best.score.value if arm.best else 0.0)
    words = [f"{arm.label} {arm.best.score.text}" for arm in ready[:3] if arm.best]
    more = f" and {len(ready) - 3} more" if len(ready) > 3 else ""
    return f"{metric}: {', '.join(words)}{more}" if words else "No method has a learning rate with all seeds yet"


def arms_table(found: Sequence[Arm], metric: str, seeds: int) -> Table:
    """One row a method: its best learning rate, and what it reached there on the test items."""
    rows = []
    for arm in found:
        if arm.best is None:
            rows.append((arm.label, "–", "–", "–", "–", f"no learning rate has a loss for all {seeds} seeds"))
            continue
        best = arm.best
        note = "at the edge of the rates tried" if arm.at_edge else ""
        rate = f"{best.learning_rate:g}"
        rows.append((arm.label, rate, best.score.text, best.forgetting.text, best.validation.text, note))
    header = ("method", "learning rate", metric, "forgetting", "validation loss", "note")
    over = f"± half a 95 % interval over {seeds} seeds (Student’s t)." if seeds > 1 else "One seed: no interval."
    return Table(header, tuple(rows), f"Learning rate by validation loss; score on the test items. {over}")


def pairs_table(compared: Sequence[Pair]) -> Table:
    """One row a pair: the difference of the test answers, item by item."""
    rows = [
        (
            f"{pair.b} − {pair.a}", f"{pair.difference.value:+.3f}",
            f"{pair.difference.low:+.3f} to {pair.difference.high:+.3f}",
            "–" if pair.difference.p_bootstrap is None else f"{pair.difference.p_bootstrap:.2g}",
            f"{pair.difference.n:,}", f"{pair.seeds}",
        )
        for pair in compared
    ]  # fmt: skip
    words = (
        "Paired over test items: each item’s mean over the seeds of both sides; interval and p by a bootstrap of whole "
        "pictures. It says what other items would bring, not other seeds; the intervals above say that."
    )
    return Table(("difference", "mean over items", "95 % interval", "p", "items", "seeds"), tuple(rows), words)


def _files(compared: Compared, found: Sequence[Arm], tests: Sequence[Pair], table: Table) -> None:
    folder, results = compared.folder, compared.results.values()
    columns = list(dict.fromkeys(key for result in results for key in result))
    write_csv(folder / "cells.csv", columns, [[result.get(key) for key in columns] for result in results])
    write_csv(folder / "table.csv", table.header, table.rows)
    points = [
        (p.method, p.rank, p.learning_rate, p.validation.value, p.score.value, p.score.half, p.forgetting.value,
         p.forgetting.half, p.score.n)
        for arm in found for p in arm.points
    ]  # fmt: skip
    for name in ("pareto", "rates"):
        write_csv(folder / f"{name}.csv", _POINT, points)
    content = {"arms": [asdict(arm) for arm in found], "pairs": [asdict(pair) for pair in tests]}
    # NaN, which a training that broke down leaves, is no JSON: null.
    write_json(folder / "results.json", json.loads(json.dumps(content), parse_constant=lambda _: None))
