"""Draw the plots of a run: loss, forgetting, scores over steps; colours and styles of all plots.

The colours by Okabe and Ito are distinguishable for colour-blind readers; shapes and labels repeat them. A figure is as
wide as the page, so that its text has the size of the surrounding text. Only Matplotlib's Agg backend is used.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_data.cards import data_uri
from milora_vl.common.atomic_write import write_text
from milora_vl.report.read_run import RunFiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One method has one colour, on every plot.
METHOD_COLOURS = {
    "milora": "#0072B2", "lora": "#D55E00", "full": "#5F5F5F", "pissa": "#E69F00", "random": "#56B4E9",
    "dora": "#CC79A7",
}  # fmt: skip
_OTHERS = ("#2F4B7C", "#A05195", "#B8860B", "#00798C", "#6B4226")  # of a label without one, such as a run's name
_MARKS = "osD^vPX<>p"
INK, GREY, PAPER = "#24292f", "#8a8a8a", "#ffffff"
WIDTH = 8.6  # inches; a page shows an inch as 100 CSS pixels
_DPI = 200  # twice the pixels of the page give sharp text on any screen
History = Sequence[Mapping[str, Any]]


def method_colour(label: str) -> str | None:
    """Return the colour of the first method that a label names, None without one.

    >>> method_colour("LoRA r=8") == METHOD_COLOURS["lora"], method_colour("runs/a")
    (True, None)
    """
    return next((METHOD_COLOURS[word] for word in re.findall(r"[a-z]+", label.lower()) if word in METHOD_COLOURS), None)


def colours_of(labels: Sequence[str]) -> dict[str, str]:
    others = cycle(_OTHERS)
    return {label: method_colour(label) or next(others) for label in labels}


def marks_of(labels: Sequence[str]) -> dict[str, str]:
    return dict(zip(labels, cycle(_MARKS), strict=False))


def draw(folder: Path, name: str, figure: Figure) -> str:
    """Write a figure to `folder` as `name`.png, and return its data URI for a page."""
    image = png(figure)
    (folder / f"{name}.png").write_bytes(image)
    return data_uri(image, "image/png")


def plots_of(run: RunFiles) -> dict[str, str]:
    """Draw the plots that the run's files allow into its folder plots/, and return them as URIs.

    `loss`, `forgetting`, `suite`.
    """
    targets = run.policy.get("targets", ())
    adapted = [str(target["method"]) for target in targets if target.get("rank")]
    colour = method_colour(next(iter(adapted), "full")) or INK
    figures = {}
    if any("loss" in entry for entry in run.history):
        figures["loss"] = loss_figure(run.history, colour)
    if any("forgetting" in entry for entry in run.history):
        figures["forgetting"] = steps_figure(run.history, {"": "forgetting"}, "forgetting, nats per token")
    if names := suites_of(run.history):
        keys = {name: f"{SCORE}{name}" for name in names}
        figures["suite"] = steps_figure(run.history, keys, "score, % or points")
    (run.folder / "plots").mkdir(exist_ok=True)
    return {name: draw(run.folder / "plots", name, figure) for name, figure in figures.items()}


@contextmanager
def page_figure(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """Yield an empty figure, by default as wide as the page; inside the block, matplotlib has our sizes and colours."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        "figure.dpi": _DPI,
        "font.size": 9.5,
        "axes.linewidth": 0.8,
        "axes.titlepad": 8.0,
    }
    with mpl.rc_context(settings):
        yield Figure(figsize=(width, height), layout="constrained")


def loss_figure(history: History, colour: str = INK) -> Figure:
    train, evaluated, rate = (_series(history, key) for key in ("loss", "eval_loss", "learning_rate"))
    with page_figure(3.6) as figure:
        top, strip = figure.subplots(2, sharex=True, height_ratios=(6, 1))
        many = len(train[0]) > 30
        top.plot(*train, color=colour, lw=1 if many else 1.8, alpha=0.4 if many else 1, label=None if many else "train")
        if many:
            top.plot(train[0], _smooth(train[1]), color=colour, lw=2, label="train, smoothed")
        if evaluated[0]:
            top.plot(*evaluated, color=INK, lw=1.4, ls="--", marker="o", ms=5, label="evaluation")
        top.set_ylabel("loss, nats per token")
        losses = train[1] + evaluated[1]
        if min(losses) < max(losses) / 2:  # otherwise the curve would be a flat line at the top
            top.set_ylim(bottom=0)
        top.legend(loc="upper right")
        peak = max(rate[1], default=0.0) or 1.0
        strip.fill_between(*rate, color=GREY, alpha=0.35, lw=0)
        strip.set(xlabel="step", xlim=(0, None), ylim=(0, peak))
        strip.locator_params(axis="x", nbins=8, integer=True)
        strip.set_yticks([0, peak], ["0", f"{peak:.0e}".replace("e-0", "e-")])
        strip.set_ylabel("rate", rotation=0, ha="right", va="center")
    return figure


SCORE = "eval_suite_"  # in the log: the score of a benchmark during training, in percent or points


def suites_of(history: History) -> list[str]:
    keys = dict.fromkeys(key for entry in history for key in entry if key.startswith(SCORE))
    return [key.removeprefix(SCORE) for key in keys if not key.endswith("_stderr")]


def steps_figure(history: History, keys: Mapping[str, str], ylabel: str) -> Figure:
    """Draw measurements over steps, each with one standard error on either side; `keys` has their names in the log."""
    colours, marks = colours_of(list(keys)), marks_of(list(keys))
    with page_figure(2.6) as figure:
        axis = figure.subplots()
        for name, key in keys.items():
            steps, values = _series(history, key)
            _, errors = _series(history, f"{key}_stderr")
            axis.errorbar(
                steps, values, yerr=errors, color=colours[name], marker=marks[name], ms=5,
                lw=1.6, elinewidth=0.8, label=name,
            )  # fmt: skip
        axis.set(xlabel="step", ylabel=ylabel, xlim=(0, None))
        axis.locator_params(axis="x", nbins=8, integer=True)
        if len(keys) > 1:
            axis.legend(loc="best")
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as PNG with 128 colours, which is a third of the size."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    small = io.BytesIO()
    image.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())


def _series(history: History, key: str) -> tuple[list[int], list[float]]:
    entries = [(int(entry["step"]), float(entry[key])) for entry in history if key in entry]
    return [step for step, _ in entries], [value for _, value in entries]


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over a centred window of a tenth of the run, narrower at the ends. It has no lag."""
    half = max(1, len(values) // 20)
    windows = ((i, min(i, len(values) - 1 - i, half)) for i in range(len(values)))
    return [sum(values[i - reach : i + reach + 1]) / (2 * reach + 1) for i, reach in windows]
