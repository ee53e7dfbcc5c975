"""Write the measured numbers of README and the pages, and README's chart: `python -m studies.figures`.

A page has each table between two comments, <!-- figures: NAME --> and <!-- end -->. All numbers come from the CSV files
in docs/studies: one row is one training, at one learning rate and with one seed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "studies"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("choose", "next-task", "results")))
BLOCK = re.compile(r"(<!-- figures: (.*?) -->).*?(<!-- end -->)", re.DOTALL)
Cells = Mapping[Cell, Mapping[str, Any]]
# What is forgotten about pictures, by the name of its column: answers about drawn shapes, in a sentence and in a word,
# and descriptions of photographs.
PROBES = {"forgetting_pictures": "shapes", "forgetting_words": "words", "forgetting_photos": "photos"}
LORA = "lora"
PICTURES = "about pictures"  # the geometric mean over the probes


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """A training that methods are compared on: its name, its length, its CSV files, and its arms with their labels.

    The others are read at the arm LORA. `held_out` is the number of validation and of test records; 0 where the files
    have no loss of the test.
    """

    name: str
    steps: int
    records: int
    files: tuple[str, ...]
    arms: Mapping[str, str] = field(default_factory=dict)
    held_out: tuple[int, int] = (1, 0)

    @property
    def title(self) -> str:
        return f"{self.name}, {self.steps} steps"

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
# How to train one task after the other -> its rows.
WAYS = {
    "`--method lora`, then `--adapter`": "lora",
    "rows along the task’s gradient, then `--after`": "after",
    "the same with `--base_kl_weight 1`": "after-kl",
}
EARLIER = ", an earlier commit"
OURS, RANDOM, WITH_KL = "protected MiLoRA", "protected, random rows of A", "LoRA, `base_kl`"
OURS_WITH_KL = "protected MiLoRA, `base_kl`"  # on text, where it is not the default
TASKS = (
    TaskFiles(
        "SmolLM2: topics", 40, 16, ("equal.smollm2",),
        {"protected": OURS, "lora": "LoRA", "lora-kl": WITH_KL, "lora-off-target-0.25": "LoRA, KL off the target",
         "lora-off-target": "LoRA, KL off the target, 4 times the weight", "inside": "A = C R",
         "inside-128": "A = C R, 128 directions"},
        held_out=(96, 240),
    ),
    TaskFiles(
        "SmolLM2: topics", 300, 16, ("equal.smollm2-300",),
        {"protected": OURS, "lora": "LoRA", "lora-kl": WITH_KL, "protected-kl": OURS_WITH_KL}, held_out=(96, 240),
    ),
    TaskFiles(
        f"SmolLM2: topics{EARLIER}", 40, 16, ("default.smollm2", "curves.smollm2"),
        {"plain": OURS, "lora": "LoRA", "random-rows": RANDOM}, held_out=(96, 240),
    ),
    TaskFiles(
        "MiniLM-L6: topics", 60, 32, ("default.minilm", "curves.minilm"),
        {"plain": OURS, "lora": "LoRA", "random-rows": RANDOM},
    ),
    TaskFiles(
        "smol-llava: emoji", 30, 8, ("equal.smol-llava",),
        {"protected": OURS, "lora": "LoRA", "lora-kl": WITH_KL, "inside": "A = C R",
         "inside-128": "A = C R, 128 directions"},
        held_out=(105, 221),
    ),
    TaskFiles(
        "smol-llava: emoji", 300, 8, ("equal.smol-llava-300",),
        {"protected": OURS, "lora": "LoRA", "lora-kl": WITH_KL}, held_out=(105, 221),
    ),
    TaskFiles(
        "smol-llava: easy-VQA", 160, 4, ("equal.easy-vqa",),
        {"protected": OURS, "lora": "LoRA", "lora-kl": WITH_KL}, held_out=(64, 262),
    ),
)  # fmt: skip
IN_SHORT = (TASKS[0], TASKS[1], *TASKS[-3:])
CHART = ROOT / "docs" / "pictures" / "default.png"
ENDS = (OURS, OURS_WITH_KL, "LoRA", WITH_KL)
COLOURS = {OURS: METHOD_COLOURS["milora"], "LoRA": METHOD_COLOURS["lora"], WITH_KL: METHOD_COLOURS["pissa"]}
FORGETS = {"forgetting": "text", PICTURES: "pictures"}
SHOWN = {
    "train_loss": "training loss", "validation_loss": "held-out loss", "score": "score", "forgetting": "text",
    **PROBES, PICTURES: "mean",
}  # fmt: skip


def ends() -> str:
    """Return what protected MiLoRA and LoRA learn and forget, at the learning rate with the lowest held-out loss."""
    rows = []
    for task in (task for task in TASKS if not task.name.endswith(EARLIER)):
        cells = task.joined()
        for arm, label in task.arms.items():
            if label in ENDS and any(cell.method == arm for cell in cells):
                rate, columns = _best(cells, arm)
                shown = (columns[key].text if key in columns else "–" for key in SHOWN)
                rows.append((task.title, label, f"{rate:g}", *shown))
    return Table(("task", "trains", "rate", *SHOWN.values()), tuple(rows)).markdown()


def equal() -> str:
    """Return what each method forgets at equal held-out loss, where LoRA forgets 1."""
    keys, rows = {"forgetting": "text", **PROBES}, []
    for task in TASKS:
        cells = task.joined()
        for arm, label in task.arms.items():
            if arm != LORA and any(cell.method == arm for cell in cells):
                ratios = (_ratio(_forgetting(cells, key), arm, LORA) for key in keys)
                seeds = max(columns["score"].n for columns in _by_rate(cells, arm).values())
                rows.append((task.title, label, str(seeds), *map(_text, ratios)))
    return Table(("task", "trains", "seeds", *keys.values()), tuple(rows)).markdown()


def _forgetting(cells: Cells, key: str) -> Cells:
    """Return the cells that measure `key`, with it as what they forgot."""
    return {cell: {**row, "forgetting": row[key]} for cell, row in cells.items() if row.get(key)}


def in_short() -> str:
    """Return README's table: the lowest held-out loss, and what is forgotten at equal loss, where LoRA forgets 1."""
    rows = []
    for task in IN_SHORT:
        cells = task.joined()
        of_lora = _best(cells, LORA)[1]["validation_loss"].text
        for arm, label in task.arms.items():
            if label in COLOURS and arm != LORA and any(cell.method == arm for cell in cells):
                best = _best(cells, arm)[1]
                ratios = (_text(_ratio(_forgetting(cells, key), arm, LORA)) for key in FORGETS)
                rows.append((task.title, label, str(best["score"].n), best["validation_loss"].text, of_lora, *ratios))
    header = ("task", "trains", "seeds", "lowest held-out loss", "LoRA’s", *FORGETS.values())
    return Table(header, tuple(rows)).markdown()


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
        rate: {key: mean_of([float(row[key]) for row in of_rate]) for key in SHOWN if all(r.get(key) for r in of_rate)}
        for rate, of_rate in rows.items()
    }


def chart() -> Figure:
    """Draw what is forgotten over the held-out loss: a small point is a training, a large one the mean of a rate."""
    with page_figure(5.2, 9.2) as figure, rc_context({"font.size": 9}):
        panels = list(figure.subplots(2, len(IN_SHORT) // 2 + 1).flat)
        for empty in panels[len(IN_SHORT) :]:
            empty.set_axis_off()
        for axes, task in zip(panels, IN_SHORT, strict=False):
            joined = task.joined()
            key = PICTURES if _forgetting(joined, PICTURES) else "forgetting"
            cells = _forgetting(joined, key)
            for mark, (arm, label) in zip("osD^v", task.arms.items(), strict=False):
                if label in COLOURS and any(cell.method == arm for cell in cells):
                    points = [_point(row, key) for cell, row in cells.items() if cell.method == arm]
                    of_rates = _by_rate(cells, arm).values()
                    means = [(mean["validation_loss"].value, mean[key].value) for mean in of_rates]
                    axes.plot(*zip(*points, strict=True), mark, color=COLOURS[label], ms=3, alpha=0.45)
                    name = label.replace("`", "")
                    axes.plot(*zip(*means, strict=True), f"{mark}-", color=COLOURS[label], ms=6, lw=1, label=name)
            low, high = axes.get_ylim()
            axes.set(yscale="log", xlabel="held-out loss", title=task.title, ylim=(0.5 * max(low, 0.02), 2 * high))
            axes.set_ylabel(f"forgotten about {FORGETS[key]}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        panels[-1].legend(*axes.get_legend_handles_labels(), loc="center")
    return figure


def _point(row: Mapping[str, Any], key: str) -> tuple[float, float]:
    return float(row["validation_loss"]), float(row[key])


def others() -> str:
    """Return what each setting forgets over LoRA on two tasks."""
    tasks = (SMOLLM2, MINILM)
    cells = [task.cells() for task in tasks]
    rows = []
    for setting, methods in OTHERS.items():
        ratios = [
            _text(_ratio(of_task, method, LORA)) if method else ""
            for task, of_task, method in zip(tasks, cells, methods, strict=True)
        ]
        rows.append((setting, *ratios))
    return Table(("setting", "SmolLM2", "MiniLM-L6"), tuple(rows)).markdown()


def rates() -> str:
    """Return the rates at which protected MiLoRA and LoRA ran, the lowest loss in bold."""
    rows = []
    for task in TASKS:
        cells, ours = task.joined(), next(arm for arm, label in task.arms.items() if label == OURS)
        rows.append((task.name, f"{task.steps} x {task.records}", _rates(cells, ours), _rates(cells, LORA)))
    return Table(("task", "steps x records", OURS, "LoRA"), tuple(rows)).markdown()


def sequence() -> str:
    """Return the scores of three tasks after their own training and at the end."""
    cells = read_cells(DOCS / "sequence.smollm2.csv")
    keys = ("score_1_1", "score_3_1", "score_2_2", "score_3_2", "score_3_3", "forgetting_3")
    rows = []
    for way, arm in WAYS.items():
        of_way = [row for cell, row in cells.items() if cell.method == arm]
        columns = [[float(row[key]) for row in of_way if row.get(key)] for key in keys]
        rows.append((way, str(len(of_way)), *(mean_of(values).text if values else "–" for values in columns)))
    header = ("", "seeds", "task 1, then", "at the end", "task 2, then", "at the end", "task 3", "text forgotten")
    return Table(header, tuple(rows)).markdown()


FIGURES: dict[str, Callable[[], str]] = {
    "ends": ends,
    "equal": equal,
    "in short": in_short,
    "others": others,
    "rates": rates,
    "sequence": sequence,
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
    return at_common_loss(curves[method], curves[lora]) if {method, lora} <= curves.keys() else None


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
