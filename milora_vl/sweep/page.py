"""The files of a sweep: cells.csv, table.csv, results.json, figures with their CSV, and sweep.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from milora_data.page import render as pages
from milora_vl.reporting.drawing import draw
from milora_vl.reporting.plots import write_csv
from milora_vl.reporting.tables import Table
from milora_vl.sweep import plots
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.results import Arm, Pair, arms, pairs
from milora_vl.sweep.runner import Result, Sweep

_POINT = ("method", "rank", "learning_rate", "validation", "score", "score_half", "forgetting", "forgetting_half", "n")


def write(sweep: Sweep, cells: Sequence[Cell], seeds: int, command: str) -> tuple[Path, Table]:
    """Write what the finished cells say; returns the page and the table of methods."""
    results = {cell: result for cell in cells if (result := sweep.result(cell)) is not None}
    failed = [(cell, failure) for cell in cells if (failure := sweep.failure(cell)) is not None]
    found = arms(results, seeds)
    compared = pairs(sweep, found)
    metric = next((f"{r['benchmark']}, {r['metric']}" for r in results.values()), "score")
    table, tests = arms_table(found, metric, seeds), pairs_table(compared)
    _files(sweep.folder, results, found, compared, table)
    figures = []
    if found:
        caption = (
            "Up and to the left is better. Open marks are learning rates that validation did not choose; bars are 95 % "
            "intervals over seeds; the grey line joins the points that none beats in both."
        )
        figure = partial(plots.pareto_figure, found, metric)
        figures.append({"plot": draw(sweep.folder, "pareto", figure, caption, with_pdf=True), "caption": caption})
    if any(len(arm.points) > 1 for arm in found):
        caption = "Each method over the learning rates. The validation loss alone decides which one is reported."
        figure = partial(plots.rates_figure, found, metric)
        figures.append({"plot": draw(sweep.folder, "rates", figure, caption, with_pdf=True), "caption": caption})
    content = {
        "title": f"{len(found)} methods on {sweep.recipe.model}",
        "lede": lede(found, metric), "done": len(results), "count": len(cells),
        "table": table, "tests": tests, "figures": figures, "command": command,
        "failed": [(cell.name, failure["said"]) for cell, failure in failed],
        "edges": [arm.label for arm in found if arm.at_edge],
    }  # fmt: skip
    page = sweep.folder / "sweep.html"
    pages.write(page, pages.render(Path(__file__).with_name("sweep.html.j2"), content))
    return page, table


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
            rows.append((arm.label, "–", "–", "–", "–", f"no learning rate has all {seeds} seeds yet"))
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
    return Table(("difference", "of the mean", "95 % interval", "p", "items", "seeds"), tuple(rows), words)


def _files(
    folder: Path, results: Mapping[Cell, Result], found: Sequence[Arm], compared: Sequence[Pair], table: Table
) -> None:
    columns = list(dict.fromkeys(key for result in results.values() for key in result))
    write_csv(folder / "cells.csv", columns, [[result.get(key) for key in columns] for result in results.values()])
    write_csv(folder / "table.csv", table.header, table.rows)
    points = [
        (p.method, p.rank, p.learning_rate, p.validation.value, p.score.value, p.score.half, p.forgetting.value,
         p.forgetting.half, p.score.n)
        for arm in found for p in arm.points
    ]  # fmt: skip
    for name in ("pareto", "rates"):
        write_csv(folder / f"{name}.csv", _POINT, points)
    content = {"arms": [asdict(arm) for arm in found], "pairs": [asdict(pair) for pair in compared]}
    (folder / "results.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
