"""Write the measured numbers of README and the pages, and README's chart: `python -m studies.figures`.

A page has each table between two comments, <!-- figures: NAME --> and <!-- end -->. All numbers come from the CSV files
in docs/studies: one row is one training, at one learning rate and with one seed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.table import Table
from milora_vl.report.plots import METHOD_COLOURS, page_figure, png
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.curves import Ratio, about_pictures, at_common_loss, curves_of
from milora_vl.sweep.results import Point, arms, mean_of
from studies.page import read_cells

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "studies"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("choose", "next-task", "results")))
BLOCK = re.compile(r"(<!-- figures: (.*?) -->).*?(<!-- end -->)", re.DOTALL)
Cells = Mapping[Cell, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Task:
    """A training that methods are compared on: its name, its length, its CSV files, and the LoRA that it is read at."""

    name: str
    steps: int
    records: int
    files: tuple[str, ...]
    lora: str = "lora"

    def cells(self) -> dict[Cell, dict[str, Any]]:
        """Return the trainings in the files; the first file that has one counts."""
        cells: dict[Cell, dict[str, Any]] = {}
        for file in self.files:
            cells = read_cells(DOCS / f"{file}.csv") | cells
        return cells


SMOLLM2 = Task("SmolLM2: topics of names", 40, 16, ("fixed-a.smollm2", "curves.smollm2", "pictures.smollm2"))
SMOLLM2_300 = Task("SmolLM2: topics of names", 300, 16, ("fixed-a.smollm2-300",))
MINILM = Task("MiniLM-L6: topics of names", 60, 32, ("fixed-a.minilm", "curves.minilm"))
EASY_VQA = Task("smol-llava: easy-VQA", 160, 4, ("pictures.easy-vqa", "fixed-a.easy-vqa"))
EMOJI = Task("smol-llava: emoji", 30, 8, ("pictures.smol-llava", "fixed-a.smol-llava"), "lora-same-projector")
EMOJI_300 = Task("smol-llava: emoji", 300, 8, ("pictures.smol-llava-300", "fixed-a.smol-llava-300"))
# What the earlier default kept: task, its rows in the files, and what a reader has to know about them. On pictures
# it had base_kl in every fourth step; on MiniLM-L6 only its first form ran.
GRADIENT, WITH_KL, FIRST = "gradient", "kl-4", "short-gradient"
KEPT = (
    (SMOLLM2, GRADIENT, ""),
    (SMOLLM2_300, GRADIENT, ""),
    (MINILM, FIRST, " (A’s rows half as long)"),
    (EASY_VQA, WITH_KL, ""),
    (EMOJI, WITH_KL, ""),
    (EMOJI_300, WITH_KL, ""),
)
# Setting -> its rows of SmolLM2 and MiniLM-L6.
OTHERS = {
    "the earlier default (MiniLM-L6: A’s rows half as long)": (GRADIENT, FIRST),
    "`protect: 0.98`, A’s rows half as long": (f"{FIRST}-0.98", ""),
    "`protect: 0.9`, A’s rows half as long": (f"{FIRST}-0.9", f"{FIRST}-0.9"),
    "minor directions, A’s rows half as long": ("", "short-minor"),
    "random directions, A’s rows half as long": ("", "short-random"),
    "all weights": ("full", "full"),
    "the paper’s MiLoRA": ("milora", "milora"),
    "PiSSA": ("pissa", ""),
    "DoRA": ("dora", ""),
    "LoRA with `base_kl` in every step": ("lora-base_kl", ""),
    "LoRA, texts of the base among the records": ("lora-mix", ""),
    "half of a finished LoRA": ("lora-scaled-0.5", ""),
    "OSF": ("osf", ""),
    "CorDA": ("corda", ""),
    "MiCA": ("mica", ""),
    "KeepLoRA’s rows of A": ("keeplora", ""),
    "KORE’s rows of A": ("kore", ""),
}
# How to train one task after the other -> its rows. The first three are those of docs/next-task.md.
WAYS = {
    "`--method lora`, then `--adapter`": "lora",
    "the earlier default, then `--after`": "after",
    "the same with `--base_kl_weight 1`": "after-kl",
    "earlier records and texts as one source": "after-sum",
    "an own share for each source": "after-each",
    "each task alone on the base, updates added": "gradient-apart",
}
# The study `default`: the methods that its table shows, by their names in the files.
DEFAULT = {
    "plain": "the default",
    "lora": "LoRA",
    "lora-same-projector": "LoRA, the projector in full",
    "lora-both": "LoRA, same modules",
    "lora-both-kl": "LoRA with `base_kl`",
    "random-rows": "the default with random rows of A",
}
DEFAULT_TASKS = (
    Task("SmolLM2: topics of names", 40, 16, ("default.smollm2", "curves.smollm2")),
    Task("SmolLM2: topics of names", 300, 16, ("default.smollm2-300", "fixed-a.smollm2-300")),
    Task("MiniLM-L6: topics of names", 60, 32, ("default.minilm", "curves.minilm")),
    Task("smol-llava: easy-VQA", 160, 4, ("default.easy-vqa", "fixed-a.easy-vqa")),
    Task("smol-llava: drawings", 40, 8, ("default.drawings",), "lora-both"),  # the product's own commands
    Task("smol-llava: emoji", 30, 8, ("default.smol-llava", "fixed-a.smol-llava"), "lora-same-projector"),
)
CHART = ROOT / "docs" / "pictures" / "default.png"  # of the last task in DEFAULT_TASKS
IN_CHART = {"plain": ("the default", "milora"), "lora-both": ("LoRA", "lora")}
FORGETS = {"forgetting": "about text", "forgetting_pictures": "about pictures"}
NO_RESULTS = "The study runs; no result is in yet.\n"


def default() -> str:
    """Return what the default and LoRA learn and forget, each at its best learning rate."""
    rows = []
    for task in DEFAULT_TASKS:
        if not (DOCS / f"{task.files[0]}.csv").is_file():
            continue
        cells = task.cells()
        for method, label in DEFAULT.items():
            best, about = _best(cells, method)
            if best is not None:
                if method == "lora" and about != "–":  # with pictures, that arm trains the projector in full
                    label = DEFAULT["lora-same-projector"]
                rows.append((
                    task.name, str(task.steps), label, f"{best.learning_rate:g}", str(len(best.seeds)),
                    best.validation.text, best.score.text, best.forgetting.text, about,
                ))  # fmt: skip
    header = ("task", "steps", "trains", "rate", "seeds", "loss", "score", "forgets text", "about pictures")
    return Table(header, tuple(rows)).markdown() if rows else NO_RESULTS


def in_short() -> str:
    """Return README's table: what the default and LoRA learn and forget on the last task in DEFAULT_TASKS."""
    task = DEFAULT_TASKS[-1]
    columns = {DEFAULT[method]: _best(task.cells(), method) for method in ("plain", "lora-both", "lora-both-kl")}
    known = {label: (best, about) for label, (best, about) in columns.items() if best is not None}
    if not known:
        return NO_RESULTS
    rows = (
        ("validation loss", *(best.validation.text.partition(" ")[0] for best, _ in known.values())),
        ("score", *(best.score.text.partition(" ")[0] for best, _ in known.values())),  # intervals: docs/results.md
        ("forgets text", *(best.forgetting.text.partition(" ")[0] for best, _ in known.values())),
        ("forgets about pictures", *(about.partition(" ")[0] for _, about in known.values())),
    )
    seeds = "/".join(sorted({str(len(best.seeds)) for best, _ in known.values()}))
    return Table((f"{task.name}, {task.steps} steps, {seeds} seeds", *known), rows).markdown()


def _best(cells: Cells, method: str) -> tuple[Point | None, str]:
    """Return a method at the rate with the lowest validation loss, and what it forgets there about pictures."""
    of_method = {cell: row for cell, row in cells.items() if cell.method == method}
    seeds = len({cell.seed for cell in of_method})
    best = next((arm.best for arm in arms(of_method, seeds)), None)
    pictures = next((arm.points for arm in arms(about_pictures(of_method), seeds)), ())
    rate = best and best.learning_rate
    return best, next((point.forgetting.text for point in pictures if point.learning_rate == rate), "–")


def chart_points() -> dict[str, list[list[Mapping[str, Any]]]]:
    """Return the trainings in README's chart: by method, one list for each learning rate, with a row for each seed."""
    cells = DEFAULT_TASKS[-1].cells()
    points: dict[str, list[list[Mapping[str, Any]]]] = {}
    for method in IN_CHART:
        rates = sorted({cell.learning_rate for cell in cells if cell.method == method})
        points[method] = [
            [row for cell, row in cells.items() if (cell.method, cell.learning_rate) == (method, rate)]
            for rate in rates
        ]
    return points


def chart() -> Figure:
    """Draw the score over what is forgotten about text and about pictures, for the default and LoRA."""
    with page_figure(2.7, 5) as figure, rc_context({"font.size": 9}):
        for axes, (key, about) in zip(figure.subplots(1, 2, sharey=True), FORGETS.items(), strict=True):
            for method, rates in chart_points().items():
                label, colour = IN_CHART[method][0], METHOD_COLOURS[IN_CHART[method][1]]
                x, y = ([[float(row[name]) for row in rows] for rows in rates] for name in (key, "score"))
                middles = [[mean_of(values).value for values in one] for one in (x, y)]
                ranges = [
                    [[m - min(values) for m, values in zip(means, one, strict=True)],
                     [max(values) - m for m, values in zip(means, one, strict=True)]]
                    for means, one in zip(middles, (x, y), strict=True)
                ]  # fmt: skip
                mark = "os"[list(IN_CHART).index(method)]
                axes.errorbar(
                    *middles,
                    xerr=ranges[0],
                    yerr=ranges[1],
                    color=colour,
                    marker=mark,
                    ms=6,
                    lw=1,
                    elinewidth=1,
                    label=label,
                )
            axes.set(xlabel=f"forgotten {about}\n(nats a token)", xlim=(0, 1.15 * axes.dataLim.x1))
            axes.set_ylim(0, 1.25 * axes.dataLim.y1)
            axes.locator_params(nbins=5)
            axes.text(0.04, 0.98, "\N{NORTH WEST ARROW} better", transform=axes.transAxes, va="top")
        figure.axes[0].set_ylabel("score on the new task")
        figure.axes[1].legend(loc="lower right")
    return figure


def kept() -> str:
    """Return what the earlier default forgot, where LoRA forgets 1, and the losses that both reach."""
    rows = []
    for task, method, note in KEPT:
        cells = task.cells()
        curves = curves_of(cells)
        ends = [(front[0].loss, curves[task.lora][seed][0].loss) for seed, front in curves[method].items()]
        of_method, of_lora = (mean_of(losses).value for losses in zip(*ends, strict=True))
        reached = sum(loss <= other for loss, other in ends)
        rows.append((
            task.name + note, str(task.steps), _text(_ratio(cells, method, task.lora)),
            _text(_ratio(about_pictures(cells), method, task.lora)),
            f"{of_method:.2f} ({of_lora:.2f})", f"{reached} of {len(ends)}",
        ))  # fmt: skip
    header = ("task", "steps", "forgets text", "about pictures", "lowest loss (LoRA’s)", "seeds that reach LoRA’s")
    return Table(header, tuple(rows)).markdown()


def others() -> str:
    """Return what each setting forgets over LoRA on two tasks."""
    tasks = (SMOLLM2, MINILM)
    cells = [task.cells() for task in tasks]
    rows = []
    for setting, methods in OTHERS.items():
        ratios = [
            _text(_ratio(of_task, method, task.lora)) if method else ""
            for task, of_task, method in zip(tasks, cells, methods, strict=True)
        ]
        rows.append((setting, *ratios))
    return Table(("setting", "SmolLM2", "MiniLM-L6"), tuple(rows)).markdown()


def rates() -> str:
    """Return the rates at which the default and LoRA ran, the lowest loss in bold."""
    rows = []
    for task in DEFAULT_TASKS:
        cells = task.cells()
        rows.append((task.name, f"{task.steps} x {task.records}", _rates(cells, "plain"), _rates(cells, task.lora)))
    return Table(("task", "steps x records", "the default", "LoRA"), tuple(rows)).markdown()


def sequence(ways: Iterable[str] = tuple(WAYS)[:3]) -> str:
    """Return the scores of three tasks after their own training and at the end."""
    cells = read_cells(DOCS / "sequence.smollm2.csv")
    keys = ("score_1_1", "score_3_1", "score_2_2", "score_3_2", "score_3_3", "forgetting_3")
    rows = []
    for way in ways:
        of_way = [row for cell, row in cells.items() if cell.method == WAYS[way]]
        columns = [[float(row[key]) for row in of_way if row.get(key)] for key in keys]
        rows.append((way, str(len(of_way)), *(mean_of(values).text if values else "–" for values in columns)))
    header = ("", "seeds", "task 1, then", "at the end", "task 2, then", "at the end", "task 3", "text forgotten")
    return Table(header, tuple(rows)).markdown()


FIGURES: dict[str, Callable[[], str]] = {
    "default": default,
    "in short": in_short,
    "kept": kept,
    "others": others,
    "rates": rates,
    "sequence": sequence,
    "other ways": lambda: sequence(tuple(WAYS)[3:]),
}


def written(page: str) -> str:
    """Return the text of a page with all its tables computed again. Raises KeyError for an unknown name."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{FIGURES[found[2]]()}{found[3]}", page)


def main() -> int:
    """Write the chart and the pages."""
    CHART.write_bytes(png(chart()))
    for page in PAGES:
        write_text(page, written(page.read_text(encoding="utf-8")))
    return 0


def _ratio(cells: Cells, method: str, lora: str) -> Ratio | None:
    curves = curves_of(cells)
    return at_common_loss(curves[method], curves[lora]) if curves else None


def _text(ratio: Ratio | None) -> str:
    return ratio.text if ratio else "–"


def _rates(cells: Cells, method: str) -> str:
    """Return the rates at which a method ran; the one with the lowest mean loss is bold."""
    losses = {
        rate: fmean(
            float(row["validation_loss"]) for c, row in cells.items() if (c.method, c.learning_rate) == (method, rate)
        )
        for rate in {c.learning_rate for c in cells if c.method == method}
    }
    seeds = {rate: sum((c.method, c.learning_rate) == (method, rate) for c in cells) for rate in losses}
    best = min(losses, key=lambda rate: (-seeds[rate], losses[rate]))  # of the rates with all seeds
    return ", ".join(f"**{rate:g}**" if rate == best and len(losses) > 1 else f"{rate:g}" for rate in sorted(losses))


if __name__ == "__main__":
    sys.exit(main())
