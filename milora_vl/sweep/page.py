"""Write the files of a sweep: cells.csv, table.csv, results.json, figures with their CSV, and sweep.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milora_eval.stats import Difference
from milora_vl.common.atomic_write import write_json
from milora_vl.common.cli import page as pages
from milora_vl.common.cli.table import Table
from milora_vl.report.plots import draw, write_csv
from milora_vl.sweep import plots
from milora_vl.sweep.cells import Cell, CellNumbers
from milora_vl.sweep.curves import equal_loss_table, ratios_to
from milora_vl.sweep.results import Answers, Arm, Pair, arms, pairs
from milora_vl.sweep.runner import Sweep

FORGETS = "KL from the base on general text, nats per token"


@dataclass(frozen=True, slots=True)
class Compared:
    """The content of a page: cells with their results, test items and failures, and the command that repeats it."""

    folder: Path
    title: str
    cells: Sequence[Cell]
    results: Mapping[Cell, CellNumbers]
    failed: Mapping[Cell, Mapping[str, Any]]
    answers: Answers
    seeds: int
    metric: str
    forgets: str
    command: str
    reference: str | None = None  # the arm at whose losses the curves are read; None: no curves
    cells_are: str = "Every cell is a run folder in cells/ with its own report"


def of_sweep(sweep: Sweep, cells: Sequence[Cell], seeds: int, command: str) -> Compared:
    """Return the current state of a sweep: the requested cells, and finished cells of earlier commands."""
    cells = list(dict.fromkeys([*cells, *sweep.finished({cell.seed for cell in cells})]))
    results = {cell: result for cell in cells if (result := sweep.result(cell)) is not None}
    failed = {cell: failure for cell in cells if (failure := sweep.failure(cell)) is not None}
    metric = next((f"{r['benchmark']}, {r['metric']}" for r in results.values()), "score")
    arms_count = len({cell.arm for cell in results})
    title = f"{arms_count} methods on {sweep.recipe.model}"
    labels = dict.fromkeys(cell.label for cell in results)
    first = next((label for label in labels if label.split()[0] == "lora"), next(iter(labels), None))
    reference = first if len(labels) > 1 and len({cell.learning_rate for cell in results}) > 1 else None
    return Compared(
        sweep.folder, title, cells, results, failed, sweep.answers, seeds, metric, FORGETS, command, reference
    )


def write(compared: Compared) -> tuple[Path, Table]:
    """Write the page and the files of the finished cells; return the path of the page and the table of methods."""
    all_arms = _in_order(arms(compared.results, compared.seeds), compared.cells)
    tests = pairs(all_arms, compared.answers)
    shares = {cell.label: result["protect"] for cell, result in compared.results.items() if "protect" in result}
    table = arms_table(all_arms, compared.metric, compared.seeds, shares)
    at_equal_loss = equal_loss_table(compared.results, compared.reference) if compared.reference else None
    _files(compared, all_arms, tests, table, at_equal_loss)
    content = {
        "title": compared.title, "lede": lede(all_arms, compared.metric),
        "done": len(compared.results), "count": len(compared.cells),
        "cells_are": compared.cells_are, "table": table, "tests": pairs_table(tests),
        "curves": at_equal_loss,
        "ratios": _ratios_figure(compared) if at_equal_loss else None,
        "figures": _figures(compared, all_arms), "command": compared.command,
        "failed": [(cell.name, failure["said"]) for cell, failure in compared.failed.items()],
        "edges": [arm.label for arm in all_arms if arm.at_edge],
    }  # fmt: skip
    page = compared.folder / "sweep.html"
    pages.write(page, pages.render(Path(__file__).with_name("sweep.html.j2"), content))
    return page, table


def _in_order(all_arms: Sequence[Arm], cells: Sequence[Cell]) -> list[Arm]:
    """Return the arms in the requested order: the others are compared with the first one."""
    requested = list(dict.fromkeys(cell.arm for cell in cells))
    return sorted(all_arms, key=lambda arm: requested.index((arm.points[0].method, arm.points[0].rank)))


def _figures(compared: Compared, all_arms: Sequence[Arm]) -> list[dict[str, Any]]:
    figures = []
    if all_arms:
        caption = (
            "Score over forgetting, with 95 % intervals over seeds. The validation loss selects the filled marker."
        )
        figure = plots.score_figure({compared.forgets: all_arms}, compared.metric, compared.title)
        figures.append({"plot": draw(compared.folder, "score", figure, caption, with_pdf=True), "caption": caption})
    if any(len(arm.points) > 1 for arm in all_arms):
        caption = "Each method over the learning rates. The validation loss alone selects the reported one."
        figure = plots.rates_figure(all_arms)
        figures.append({"plot": draw(compared.folder, "rates", figure, caption, with_pdf=True), "caption": caption})
    return figures


def _ratios_figure(compared: Compared) -> dict[str, Any]:
    """Return the figure of the table of ratios, for text and, if the cells measure them, pictures."""
    assert compared.reference is not None
    ratios = ratios_to(compared.reference, compared.results)
    caption = f"The ratios of the table: a line is a 95 % interval over seeds, 1 is {compared.reference}."
    figure = plots.ratios_figure(ratios, [compared.reference], "Forgetting at equal validation loss")
    return {"plot": draw(compared.folder, "ratios", figure, caption, with_pdf=True), "caption": caption}


def lede(all_arms: Sequence[Arm], metric: str) -> str:
    """Return the result in one line: the best scores, highest first."""
    ready = [arm for arm in all_arms if arm.best is not None]
    ready.sort(key=lambda arm: -arm.best.score.value if arm.best else 0.0)
    words = [f"{arm.label} {arm.best.score.text}" for arm in ready[:3] if arm.best]
    more = f" and {len(ready) - 3} more" if len(ready) > 3 else ""
    return f"{metric}: {', '.join(words)}{more}" if words else "No method has a learning rate with all seeds yet"


def arms_table(all_arms: Sequence[Arm], metric: str, seeds: int, shares: Mapping[str, str]) -> Table:
    """Return a table with one row per method: its best learning rate and its results there.

    `shares` holds the shares of protected inputs by label, for arms that say them.
    """
    rows = []
    for arm in all_arms:
        name = f"{arm.label}, protect {shares[arm.label]}" if arm.label in shares else arm.label
        if arm.best is None:
            rows.append((name, "–", "–", "–", "–", f"no learning rate has a loss for all {seeds} seeds"))
            continue
        best = arm.best
        note = "at the edge of the tested rates" if arm.at_edge else ""
        rate = f"{best.learning_rate:g}"
        rows.append((name, rate, best.score.text, best.forgetting.text, best.validation.text, note))
    header = ("method", "learning rate", metric, "forgetting", "validation loss", "note")
    over = f"± is half a 95 % interval over {seeds} seeds (Student’s t)." if seeds > 1 else "One seed: no interval."
    return Table(
        header,
        tuple(rows),
        f"The validation loss selects the learning rate; the score is measured on the test items. {over}",
    )


def pairs_table(compared: Sequence[Pair]) -> Table:
    """Return a table with one row per pair: the paired difference of the test answers."""
    rows = [
        (
            f"{pair.b} − {pair.a}", f"{pair.difference.value:+.3f}", _interval(pair.difference),
            "–" if pair.difference.p_bootstrap is None else f"{pair.difference.p_bootstrap:.2g}",
            f"{pair.difference.n:,}", f"{pair.seeds}",
        )
        for pair in compared
    ]  # fmt: skip
    notes = dict.fromkeys(pair.difference.note for pair in compared if pair.difference.note)
    words = (
        "Paired over test items: the mean of each item over the seeds of both methods. Interval and p come from a "
        "bootstrap of whole pictures: they show the effect of other test items. The intervals above show the effect of "
        "other seeds." + "".join(f" Here {note}." for note in notes)
    )
    return Table(("difference", "mean over items", "95 % interval", "p", "items", "seeds"), tuple(rows), words)


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return "–"
    return f"{difference.low:+.3f} to {difference.high:+.3f}"


def _files(
    compared: Compared, all_arms: Sequence[Arm], tests: Sequence[Pair], table: Table, at_equal_loss: Table | None
) -> None:
    folder, results = compared.folder, compared.results.values()
    columns = list(dict.fromkeys(key for result in results for key in result))
    write_csv(folder / "cells.csv", columns, [[result.get(key) for key in columns] for result in results])
    write_csv(folder / "table.csv", table.header, table.rows)
    if at_equal_loss:
        write_csv(folder / "ratios.csv", at_equal_loss.header, at_equal_loss.rows)
    ratios = ratios_to(compared.reference, compared.results) if compared.reference else {}
    content = {
        "arms": [asdict(arm) for arm in all_arms], "pairs": [asdict(pair) for pair in tests],
        "ratios": {
            kind: {arm: ratio and asdict(ratio) for arm, ratio in of_kind.items()} for kind, of_kind in ratios.items()
        },
    }  # fmt: skip
    # A diverged training leaves NaN, which is not valid JSON: write null.
    write_json(folder / "results.json", json.loads(json.dumps(content), parse_constant=lambda _: None))
