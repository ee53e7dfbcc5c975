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
from statistics import fmean, geometric_mean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.table import Table
from milora_vl.report.plots import METHOD_COLOURS, page_figure, png
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.curves import Ratio, at_common_loss, curves_of
from milora_vl.sweep.results import SeedMean, mean_of
from studies.page import read_cells
from studies.study import read_study

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "studies"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("choose", "next-task", "results")))
BLOCK = re.compile(r"(<!-- figures: (.*?) -->).*?(<!-- end -->)", re.DOTALL)
Cells = Mapping[Cell, Mapping[str, Any]]
# What is forgotten about pictures, by the name of its column: answers about drawn shapes, in a sentence and in a word,
# and descriptions of photographs.
PROBES = {"forgetting_pictures": "shapes", "forgetting_words": "words", "forgetting_photos": "photos"}
PICTURES = "about pictures"  # the geometric mean over the probes


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """A training that methods are compared on: its name, its length, its CSV files, and the LoRA that it is read at.

    `held_out` is the number of validation and of test records; 0 where the files have no loss of the test.
    """

    name: str
    steps: int
    records: int
    files: tuple[str, ...]
    lora: str = "lora"
    held_out: tuple[int, int] = (1, 0)

    def cells(self) -> dict[Cell, dict[str, Any]]:
        """Return the trainings in the files; the first file that has one counts."""
        cells: dict[Cell, dict[str, Any]] = {}
        for file in self.files:
            cells = read_cells(DOCS / f"{file}.csv") | cells
        return cells

    def joined(self) -> dict[Cell, dict[str, Any]]:
        """Return the trainings with the loss of all held-out records, and the geometric mean over picture probes."""
        return {cell: row | self._of_all(row) for cell, row in self.cells().items()}

    def _of_all(self, row: Mapping[str, Any]) -> dict[str, Any]:
        parts = zip(("validation_loss", "test_loss"), self.held_out, strict=True)
        loss = sum(float(row[key]) * count for key, count in parts if count) / sum(self.held_out)
        probes = [float(row[key]) for key in PROBES if row.get(key)]
        mean = {PICTURES: geometric_mean(probes)} if len(probes) == len(PROBES) else {}
        return {"validation_loss": loss} | mean


SMOLLM2 = TaskFiles("SmolLM2: topics of names", 40, 16, ("fixed-a.smollm2", "curves.smollm2", "pictures.smollm2"))
MINILM = TaskFiles("MiniLM-L6: topics of names", 60, 32, ("fixed-a.minilm", "curves.minilm"))
# On MiniLM-L6 only the first form of the rows along the gradient ran.
GRADIENT, FIRST = "gradient", "short-gradient"
# Setting -> its rows of SmolLM2 and MiniLM-L6.
OTHERS = {
    "A’s rows along the task’s gradient (MiniLM-L6: half as long)": (GRADIENT, FIRST),
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
    "rows along the task’s gradient, then `--after`": "after",
    "the same with `--base_kl_weight 1`": "after-kl",
    "earlier records and texts as one source": "after-sum",
    "an own share for each source": "after-each",
    "each task alone on the base, updates added": "gradient-apart",
}
# The study `default`: the methods that its table shows, by their names in the files.
OURS = "protected MiLoRA"
DEFAULT = {
    "plain": OURS,
    "lora": "LoRA",
    "lora-same-projector": "LoRA, the projector in full",
    "lora-both": "LoRA, same modules",
    "lora-both-kl": "LoRA, same modules, `base_kl`",
    "lora-64-kl": "the same at the rank of protected MiLoRA",
    "random-rows": f"{OURS}, random rows of A",
}
DEFAULT_TASKS = (
    TaskFiles("SmolLM2: topics of names", 40, 16, ("default.smollm2", "curves.smollm2"), held_out=(96, 240)),
    TaskFiles("SmolLM2: topics of names", 300, 16, ("default.smollm2-300", "fixed-a.smollm2-300"), held_out=(96, 240)),
    TaskFiles("MiniLM-L6: topics of names", 60, 32, ("default.minilm", "curves.minilm")),
    TaskFiles("smol-llava: easy-VQA", 160, 4, ("default.easy-vqa", "fixed-a.easy-vqa"), held_out=(64, 131)),
    TaskFiles("smol-llava: drawings", 40, 8, ("default.drawings",), "lora-both"),  # the product's own commands
    TaskFiles(
        "smol-llava: emoji", 30, 8, ("default.smol-llava", "fixed-a.smol-llava"), "lora-same-projector",
        held_out=(64, 111),
    ),
)  # fmt: skip
CHART = ROOT / "docs" / "pictures" / "default.png"  # of the last task in DEFAULT_TASKS
IN_CHART = {"plain": (OURS, "milora"), "lora-both": ("LoRA", "lora")}
FORGETS = {"forgetting": "about text", PICTURES: "about pictures"}
SHOWN = {"validation_loss": "loss", "score": "score", "forgetting": "text", **PROBES, PICTURES: "mean"}
WITH_TRAINING = {"train_loss": "training loss", **SHOWN}
# The study `trained-a`: its arms, and its tasks.
INSIDE = {
    "fixed": OURS,
    "inside": "A = C R",
    "inside-128": "A = C R, 128 directions",
    "inside-0.98": "A = C R, share 0.98",
    "inside-kl": "A = C R, `base_kl`",
    "lora": "LoRA",
    "lora-kl": "LoRA, `base_kl`",
}
INSIDE_TASKS = (
    TaskFiles("SmolLM2: topics of names", 40, 16, ("trained-a.smollm2",), held_out=(96, 240)),
    TaskFiles("smol-llava: emoji", 30, 8, ("trained-a.smol-llava",), held_out=(105, 221)),
)


def default() -> str:
    """Return what protected MiLoRA and LoRA learn and forget, each at the learning rate with the lowest loss."""
    rows = []
    for task in DEFAULT_TASKS:
        cells = task.joined()
        for method, label in DEFAULT.items():
            if any(cell.method == method for cell in cells):
                rate, columns = _best(cells, method)
                if method == "lora" and PROBES.keys() & next(iter(cells.values())).keys():
                    label = DEFAULT["lora-same-projector"]  # with pictures, that arm trains the projector in full
                seeds = str(columns["score"].n)
                shown = (columns[key].text if key in columns else "–" for key in SHOWN)
                rows.append((task.name, str(task.steps), label, f"{rate:g}", seeds, *shown))
    return Table(("task", "steps", "trains", "rate", "seeds", *SHOWN.values()), tuple(rows)).markdown()


def in_short() -> str:
    """Return README's table: what protected MiLoRA and LoRA learn and forget on the last task in DEFAULT_TASKS."""
    task = DEFAULT_TASKS[-1]
    methods = {"plain": OURS, "lora-both": "LoRA", "lora-both-kl": "LoRA, `base_kl`"}
    columns = {label: _best(task.joined(), method)[1] for method, label in methods.items()}
    names = {
        "validation_loss": "held-out loss", "score": "score", "forgetting": "forgets text",
        PICTURES: "forgets about pictures",
    }  # fmt: skip
    rows = tuple((name, *(column[key].text for column in columns.values())) for key, name in names.items())
    return Table((f"{task.name}, {task.steps} steps, {columns[OURS]['score'].n} seeds", *columns), rows).markdown()


def inside() -> str:
    """Return what each training with A = C R and its rivals learned and forgot: one row for a method and a rate."""
    rows = []
    for task in INSIDE_TASKS:
        for method, label in INSIDE.items():
            for rate, columns in _by_rate(task.joined(), method).items():
                shown = (columns[key].text if key in columns else "–" for key in WITH_TRAINING)
                rows.append((task.name, str(task.steps), label, f"{rate:g}", str(columns["score"].n), *shown))
    return Table(("task", "steps", "trains", "rate", "seeds", *WITH_TRAINING.values()), tuple(rows)).markdown()


def inside_ratios() -> str:
    """Return what A = C R and LoRA forget at equal held-out loss, where protected MiLoRA and LoRA forget 1."""
    rows = []
    for task in INSIDE_TASKS:
        cells = task.joined()
        probes = {"text": "forgetting", "pictures, mean": PICTURES}
        for about, key in probes.items():
            known = {cell: row | {"forgetting": row[key]} for cell, row in cells.items() if key in row}
            for method, label in INSIDE.items():
                if method not in ("fixed", "lora") and any(cell.method == method for cell in known):
                    ratios = (_text(_ratio(known, method, other)) for other in ("fixed", "lora"))
                    rows.append((task.name, str(task.steps), label, about, *ratios))
    return Table(("task", "steps", "trains", "forgets", f"{OURS}: 1", "LoRA: 1"), tuple(rows)).markdown()


def inside_left() -> str:
    """Return the trainings of the study that did not run, and their hours at the mean time of those that did."""
    rows = []
    for task in INSIDE_TASKS:
        ran, planned = task.cells(), read_study(task.files[0]).cells()
        seconds = fmean(float(row["seconds"]) for row in ran.values())
        missing = [cell for cell in planned if cell not in ran]
        rows.append(
            (task.name, str(task.steps), str(len(ran)), str(len(missing)), f"{len(missing) * seconds / 3600:.1f}")
        )
    return Table(("task", "steps", "ran", "did not run", "hours"), tuple(rows)).markdown()


def _best(cells: Cells, method: str) -> tuple[float, dict[str, SeedMean]]:
    """Return the rate of a method with the lowest loss among those with all seeds, and the means of its numbers."""
    by_rate = _by_rate(cells, method)
    seeds = max(columns["score"].n for columns in by_rate.values())
    complete = {rate: columns for rate, columns in by_rate.items() if columns["score"].n == seeds}
    return min(complete.items(), key=lambda one: one[1]["validation_loss"].value)


def _by_rate(cells: Cells, method: str) -> dict[float, dict[str, SeedMean]]:
    """Return the means of the numbers of a method by rate; a number that a training lacks is left out."""
    rows: dict[float, list[Mapping[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.learning_rate):
        if cell.method == method:
            rows.setdefault(cell.learning_rate, []).append(cells[cell])
    return {
        rate: {
            key: mean_of([float(row[key]) for row in of_rate])
            for key in WITH_TRAINING
            if all(r.get(key) for r in of_rate)
        }
        for rate, of_rate in rows.items()
    }


def chart_points() -> dict[str, list[list[Mapping[str, Any]]]]:
    """Return the trainings in README's chart: by method, one list for each learning rate, with a row for each seed."""
    cells = DEFAULT_TASKS[-1].joined()
    points: dict[str, list[list[Mapping[str, Any]]]] = {}
    for method in IN_CHART:
        rates = sorted({cell.learning_rate for cell in cells if cell.method == method})
        points[method] = [
            [row for cell, row in cells.items() if (cell.method, cell.learning_rate) == (method, rate)]
            for rate in rates
        ]
    return points


def chart() -> Figure:
    """Draw the score over what is forgotten about text and about pictures, for protected MiLoRA and LoRA."""
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
    """Return the rates at which protected MiLoRA and LoRA ran, the lowest loss in bold."""
    rows = []
    for task in DEFAULT_TASKS:
        cells = task.joined()
        rows.append((task.name, f"{task.steps} x {task.records}", _rates(cells, "plain"), _rates(cells, task.lora)))
    return Table(("task", "steps x records", OURS, "LoRA"), tuple(rows)).markdown()


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
    "inside": inside,
    "inside ratios": inside_ratios,
    "inside left": inside_left,
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
