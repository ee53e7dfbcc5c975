"""The figures of a sweep: forgetting over loss, task score over forgetting, and each over the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

from milora_vl.report.plots import GREY, PAPER, WIDTH, styled
from milora_vl.sweep.curves import Curves
from milora_vl.sweep.results import Arm, Mean, front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours and three more, each with its own marker.
_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8A8A", "#9A8B00", "#7A5195", "#444444",
)  # fmt: skip
_MARKS = "osD^vPX<>*p"  # one more than colours, so that no two of a hundred arms look alike


def pareto_figure(arms: Sequence[Arm], metric: str, forgets: str) -> Figure:
    """Draw score over forgetting for every method; the selected rate is filled, the Pareto front is a grey line."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axis = figure.subplots()
        best = front([point for arm in arms for point in arm.points])
        x, y = [p.forgetting.value for p in best], [p.score.value for p in best]
        axis.step(x, y, where="post", color=GREY, lw=3, alpha=0.4, zorder=0, solid_joinstyle="miter")
        for place, arm in enumerate(arms):
            colour, mark = colour_of(place), mark_of(place)
            x, y = [p.forgetting.value for p in arm.points], [p.score.value for p in arm.points]
            axis.plot(x, y, color=colour, lw=1, alpha=0.6, zorder=1)
            for point in arm.points:
                axis.errorbar(
                    point.forgetting.value, point.score.value, xerr=point.forgetting.half, yerr=point.score.half,
                    fmt=mark, ms=7, color=colour, mfc=colour if point is arm.best else PAPER, mew=1.6,
                    elinewidth=0.8, alpha=0.95, zorder=2, label=arm.label if point is arm.points[0] else None,
                )  # fmt: skip
        axis.set(xlabel=fill(forgets, 90), ylabel=fill(metric, 50))
        scores = [point.score.value for arm in arms for point in arm.points]
        margin = 0.3 * (max(scores) - min(scores)) or 0.1  # the interval of a rate that diverges may be larger
        axis.set_ylim(min(scores) - margin, max(scores) + margin)
        if min(x for arm in arms for x in [p.forgetting.value for p in arm.points]) > 0:
            _logarithmic(axis)
        _legend(figure, axis, [arm.label for arm in arms])
    return figure


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of `curves_figure`: the name of the forgetting, the means of all trainings, and the curves over seeds.

    `reference` is the arm whose lowest losses the dashed line shows.
    """

    forgets: str
    arms: Sequence[Arm]
    curves: Curves
    reference: str
    title: str = ""


def curves_figure(panels: Sequence[Panel]) -> Figure:
    """Draw forgetting over validation loss: a thin line per seed, a marker per training (the mean over its seeds).

    The dashed line is the mean of the lowest losses of the reference, where the table reads the curves. An arm has the
    same colour in all panels: text and pictures, or several tasks.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    places = {label: place for place, label in enumerate(dict.fromkeys(arm.label for p in panels for arm in p.arms))}
    with styled():
        figure = Figure(figsize=(WIDTH, (4.4 if lines == 1 else 3.6) * lines + 0.4), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes, panels, strict=False):
            _curves_panel(axis, panel, places)
        _legend(figure, axes[0], list(places))
    return figure


def _curves_panel(axis: Any, panel: Panel, places: Mapping[str, int]) -> None:
    for arm in panel.arms:
        place = places[arm.label]
        colour = colour_of(place)
        for spots in panel.curves.get(arm.label, {}).values():
            axis.plot([s.loss for s in spots], [s.forgetting for s in spots], color=colour, lw=0.9, alpha=0.45)
        shown = [p for p in arm.points if p.forgetting.value > 0]  # a logarithm needs positive numbers
        x, y = [p.validation.value for p in shown], [p.forgetting.value for p in shown]
        axis.plot(x, y, ls="", marker=mark_of(place), ms=7, color=colour, mec=PAPER, mew=0.6)
    lowest = [spots[0].loss for spots in panel.curves[panel.reference].values()]
    axis.axvline(sum(lowest) / len(lowest), color=GREY, ls="--", lw=1)
    losses = [spot.loss for by_seed in panel.curves.values() for spots in by_seed.values() for spot in spots]
    margin = 0.05 * (max(losses) - min(losses)) or 0.1
    axis.set(xlabel="validation loss", ylabel=fill(panel.forgets, 50), yscale="log")
    axis.set_xlim(min(losses) - margin, max(losses) + margin)
    axis.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")


def _logarithmic(axis: Any) -> None:
    """Use a logarithmic x axis with plain tick labels: 0.5, 1, 2, and more of them for a short range."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    left, right = axis.get_xlim()
    subs = (1, 2, 5) if right > 20 * left else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def rates_figure(arms: Sequence[Arm], metric: str) -> Figure:
    """Draw validation loss, test score and forgetting over the learning rate, one line per method."""
    from matplotlib.figure import Figure

    panels = ("validation", "validation loss"), ("score", metric), ("forgetting", "forgetting")
    with styled():
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (field, name) in zip(axes, panels, strict=True):
            for place, arm in enumerate(arms):
                means: list[Mean] = [getattr(point, field) for point in arm.points]
                axis.errorbar(
                    [p.learning_rate for p in arm.points], [m.value for m in means], yerr=[m.half or 0 for m in means],
                    color=colour_of(place), marker=mark_of(place), ms=5, lw=1.4,
                    elinewidth=0.8,
                )  # fmt: skip
            axis.set(xscale="log", xlabel="learning rate")
            title = fill(name, 26)  # the name of a metric may be wider than its panel
            axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        _legend(figure, axis, [arm.label for arm in arms])
    return figure


def colour_of(place: int) -> str:
    """Return the colour of the arm at `place`."""
    return _COLOURS[place % len(_COLOURS)]


def mark_of(place: int) -> str:
    """Return the marker of the arm at `place`."""
    return _MARKS[place % len(_MARKS)]


def _legend(figure: Figure, axis: Any, labels: Sequence[str]) -> None:
    handles = [
        axis.plot([], [], color=colour_of(place), marker=mark_of(place), ls="", ms=7, label=label)[0]
        for place, label in enumerate(labels)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=5, handletextpad=0.2)
