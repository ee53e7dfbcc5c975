"""Write the files of a sweep: sweep.html, cells.csv, results.json, and its figure as PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_vl.common.atomic_write import write_json
from milora_vl.common.cli import page as pages
from milora_vl.common.cli.table import Table
from milora_vl.report.plots import GREY, PAPER, colours_of, draw, marks_of, page_figure, write_csv
from milora_vl.sweep.cells import NAMES, Cell, CellNumbers
from milora_vl.sweep.curves import equal_loss_table, ratios_to
from milora_vl.sweep.results import Answers, Arm, ArmDifference, arms, pairs
from milora_vl.sweep.runner import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORGETS = "KL from the base on general text, nats per token"


@dataclass(frozen=True, slots=True)
class Compared:
    """The content of a page: cells with their results, test items and failures, and the command that repeats it.

    `names` has the name to show of a method, where it is another one.
    """

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
    names: Mapping[str, str] = field(default_factory=dict)

    def named(self, label: str) -> str:
        method, *rank = label.split(" ")
        return " ".join([self.names.get(method, method), *rank])


def of_sweep(sweep: Sweep, cells: Sequence[Cell], seeds: int, command: str) -> Compared:
    cells = list(dict.fromkeys([*cells, *sweep.finished({cell.seed for cell in cells})]))
    results = {cell: result for cell in cells if (result := sweep.result(cell)) is not None}
    failed = {cell: failure for cell in cells if (failure := sweep.failure(cell)) is not None}
    metric = next((f"{r['benchmark']}, {r['metric']}" for r in results.values()), "score")
    labels = list(dict.fromkeys(cell.label for cell in results))
    first = next((label for label in labels if label.split()[0] == "lora"), next(iter(labels), None))
    has_curves = len(labels) > 1 and len({cell.learning_rate for cell in results}) > 1
    return Compared(
        sweep.folder, f"{len(labels)} methods on {sweep.recipe.model}", cells, results, failed, sweep.answers, seeds,
        metric, FORGETS, command, first if has_curves else None, names=NAMES,
    )  # fmt: skip


def write(compared: Compared) -> tuple[Path, Table]:
    requested = list(dict.fromkeys(cell.label for cell in compared.cells))  # the others are compared with the first
    all_arms = sorted(arms(compared.results, compared.seeds), key=lambda arm: requested.index(arm.label))
    tests = pairs(all_arms, compared.answers)
    table, reference = arms_table(compared, all_arms), compared.reference
    ratios = ratios_to(reference, compared.results) if reference else {}
    content = {
        "title": compared.title, "lede": lede(compared, all_arms),
        "done": len(compared.results), "count": len(compared.cells),
        "cells_are": compared.cells_are, "table": table, "tests": pairs_table(compared, tests),
        "curves": equal_loss_table(compared.results, reference, compared.named) if reference else None,
        "figure": "", "command": compared.command,
        "failed": [(cell.name, failure["said"]) for cell, failure in compared.failed.items()],
    }  # fmt: skip
    if all_arms:
        named = [replace(arm, label=compared.named(arm.label)) for arm in all_arms]
        figure = score_figure({compared.forgets: named}, compared.metric, compared.title)
        content["figure"] = draw(compared.folder, "score", figure)
    page = compared.folder / "sweep.html"
    pages.write(page, pages.render(Path(__file__).with_name("sweep.html.j2"), content))

    results = compared.results.values()
    columns = list(dict.fromkeys(key for result in results for key in result))
    write_csv(compared.folder / "cells.csv", columns, [[result.get(key) for key in columns] for result in results])
    numbers = {
        "arms": [asdict(arm) for arm in all_arms], "pairs": [asdict(pair) for pair in tests],
        "ratios": {
            kind: {arm: ratio and asdict(ratio) for arm, ratio in of_kind.items()} for kind, of_kind in ratios.items()
        },
    }  # fmt: skip
    # A diverged training leaves NaN, which is not valid JSON: write null.
    valid = json.loads(json.dumps(numbers), parse_constant=lambda _: None)
    write_json(compared.folder / "results.json", valid)
    return page, table


def lede(compared: Compared, all_arms: Sequence[Arm]) -> str:
    best = [(compared.named(arm.label), arm.best.score) for arm in all_arms if arm.best is not None]
    best.sort(key=lambda entry: -entry[1].value)
    words = ", ".join(f"{label} {score.text}" for label, score in best[:3])
    more = f" and {len(best) - 3} more" if len(best) > 3 else ""
    return f"{compared.metric}: {words}{more}" if words else "No method has a learning rate with all seeds yet"


def arms_table(compared: Compared, all_arms: Sequence[Arm]) -> Table:
    seeds = compared.seeds
    shares = {cell.label: result["protect"] for cell, result in compared.results.items() if "protect" in result}
    rows: list[tuple[str, ...]] = []
    for arm in all_arms:
        name = compared.named(arm.label) + (f", protect {shares[arm.label]}" if arm.label in shares else "")
        if (best := arm.best) is None:
            rows.append((name, "–", "–", "–", "–", f"no learning rate has a loss for all {seeds} seeds"))
            continue
        numbers = (mean.text for mean in (best.score, best.forgetting, best.validation))
        note = "at the edge of the tested rates" if arm.at_edge else ""
        rows.append((name, f"{best.learning_rate:g}", *numbers, note))
    over = f"± is half a 95 % interval over {seeds} seeds (Student’s t)." if seeds > 1 else "One seed: no interval."
    return Table(
        ("method", "learning rate", compared.metric, "forgetting", "validation loss", "note"),
        tuple(rows),
        f"The validation loss selects the learning rate; the score is measured on the test items. {over}",
    )


def pairs_table(compared: Compared, tests: Sequence[ArmDifference]) -> Table:
    rows = []
    for pair in tests:
        found = pair.difference
        has_interval = found.low is not None and found.high is not None
        rows.append((
            f"{compared.named(pair.b)} − {compared.named(pair.a)}", f"{found.value:+.3f}",
            f"{found.low:+.3f} to {found.high:+.3f}" if has_interval else "–",
            "–" if found.p_bootstrap is None else f"{found.p_bootstrap:.2g}", f"{found.n:,}", f"{pair.seeds}",
        ))  # fmt: skip
    notes = dict.fromkeys(pair.difference.note for pair in tests if pair.difference.note)
    words = (
        "Paired over test items: the mean of each item over the seeds of both methods. Interval and p come from a "
        "bootstrap of whole pictures: they show the effect of other test items. The intervals above show the effect of "
        "other seeds." + "".join(f" Here {note}." for note in notes)
    )
    return Table(("difference", "mean over items", "95 % interval", "p", "items", "seeds"), tuple(rows), words)


def score_figure(panels: Mapping[str, Sequence[Arm]], metric: str, title: str) -> Figure:
    """Draw score over forgetting: one line per method through its learning rates.

    `panels` maps the kind of forgetting (the x axis) to the arms with it: text and pictures.
    """
    labels = [arm.label for arm in next(iter(panels.values()))]
    colours, marks = colours_of(labels), marks_of(labels)
    panels = {forgets: list(map(_finite, of_panel)) for forgets, of_panel in panels.items()}
    with page_figure(4.6) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (forgets, of_panel) in zip(axes, panels.items(), strict=True):
            for arm in of_panel:
                colour, x = colours[arm.label], [p.forgetting.value for p in arm.points]
                axis.plot(x, [p.score.value for p in arm.points], color=colour, lw=1.2, alpha=0.6, zorder=1)
                for point in arm.points:
                    axis.errorbar(
                        point.forgetting.value, point.score.value, xerr=point.forgetting.half, yerr=point.score.half,
                        fmt=marks[arm.label], ms=7, color=colour, mfc=colour if point is arm.best else PAPER, mew=1.5,
                        zorder=2, elinewidth=0.8, ecolor=(colour, 0.4),
                    )  # fmt: skip
            forgotten = [point.forgetting.value for arm in of_panel for point in arm.points]
            if min(forgotten, default=0.0) > 0:
                subs = (1, 2, 5) if max(forgotten) > 6 * min(forgotten) else (1, 1.5, 2, 3, 4, 5, 6, 8)
                _logarithmic(axis, forgotten, [sub * 10.0**power for power in range(-9, 4) for sub in subs], 0.1)
            axis.set_xlabel(f"forgetting: {forgets}")
            axis.text(0.01, 0.99, "\N{NORTH WEST ARROW} better", transform=axis.transAxes, va="top", color=GREY)
        scores = [point.score.value for of_panel in panels.values() for arm in of_panel for point in arm.points] or [0]
        spread = (max(scores) - min(scores)) or 0.1  # the interval of a rate that diverges may be larger
        axes[0].set_ylim(min(scores) - 0.15 * spread, max(scores) + 0.3 * spread)
        axes[0].set_title(f"score: {metric}", loc="left", fontsize=9.5)
        lines = [axes[0].plot([], [], marker=marks[label], color=colours[label])[0] for label in labels]
        figure.legend(
            lines, labels, loc="outside upper left", ncols=5, alignment="left",
            title=title, title_fontproperties={"size": 11, "weight": "bold"},
        )  # fmt: skip
        words = "Mean over seeds, with its 95 % interval. A marker is one rate; filled: the lowest validation loss."
        figure.supxlabel(words, x=0.01, ha="left", fontsize=8.5, color=GREY)
    return figure


def _finite(arm: Arm) -> Arm:
    points = (p for p in arm.points if math.isfinite(p.score.value) and math.isfinite(p.forgetting.value))
    return replace(arm, points=tuple(points))


def _logarithmic(axis: Axes, values: Sequence[float], ticks: Iterable[float], room: float) -> None:
    """Use a logarithmic x axis. A tick has a label if it is `room`, a share of the axis, away from the one before."""
    low, high = min(values) / 1.6, max(values) * 1.6
    labelled: list[float] = []
    for tick in sorted(ticks):
        is_apart = not labelled or math.log(tick / labelled[-1]) >= room * math.log(high / low)
        labelled += [tick] if low <= tick <= high and is_apart else []
    axis.set(xscale="log", xlim=(low, high))
    axis.set_xticks(labelled, [f"{tick:g}" for tick in labelled])
    axis.set_xticks([], minor=True)
