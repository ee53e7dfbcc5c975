"""The figures of a sweep and of a study: score over forgetting, forgetting at equal loss, and each over the rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from milora_vl.core.policy.rules import label_of
from milora_vl.report.plots import GREY, INK, PAPER, WIDTH, colours_of, marks_of, method_colour, styled
from milora_vl.sweep.curves import Ratio
from milora_vl.sweep.results import Arm, Mean, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

_NOTE = "Mean over seeds, with its 95 % interval. A marker is one learning rate; filled: the lowest validation loss."


def score_figure(panels: Mapping[str, Sequence[Arm]], metric: str, title: str) -> Figure:
    """Draw score over forgetting: one line per method through its learning rates, with its name beside it.

    `panels` maps the name of what is forgotten (the x axis) to the arms with it: text and pictures.
    """
    from matplotlib.figure import Figure

    labels = [arm.label for arm in next(iter(panels.values()))]
    colours, marks = colours_of(labels), marks_of(labels)
    panels = {forgets: list(map(_finite, arms)) for forgets, arms in panels.items()}
    with styled():
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (forgets, arms) in zip(axes, panels.items(), strict=True):
            for arm in arms:
                _line(axis, arm, colours[arm.label], marks[arm.label])
            _logarithmic(axis, [point.forgetting for arm in arms for point in arm.points])
            axis.set_xlabel(f"forgetting: {forgets}")
        scores = [point.score.value for arms in panels.values() for arm in arms for point in arm.points] or [0.0]
        spread = (max(scores) - min(scores)) or 0.1  # the interval of a rate that diverges may be larger
        axes[0].set_ylim(min(scores) - 0.15 * spread, max(scores) + 0.3 * spread)
        axes[0].set_title(f"score: {metric}", loc="left", fontsize=9.5)
        for axis in axes:
            axis.text(0.01, 0.99, "\N{NORTH WEST ARROW} better", transform=axis.transAxes, va="top", color=GREY)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.supxlabel(_NOTE, x=0.01, ha="left", fontsize=8.5, color=GREY)
        figure.draw_without_rendering()  # the layout decides where the names fit
        for axis, arms in zip(axes, panels.values(), strict=True):
            _name_lines(axis, arms, colours)
    return figure


def _finite(arm: Arm) -> Arm:
    """Leave out rates at which a training diverged."""
    points = (p for p in arm.points if math.isfinite(p.score.value) and math.isfinite(p.forgetting.value))
    return replace(arm, points=tuple(points))


def _line(axis: Axes, arm: Arm, colour: str, mark: str) -> None:
    axis.plot(
        [p.forgetting.value for p in arm.points], [p.score.value for p in arm.points],
        color=colour, lw=1.2, alpha=0.6, zorder=1,
    )  # fmt: skip
    for point in arm.points:
        axis.errorbar(
            point.forgetting.value, point.score.value, xerr=point.forgetting.half, yerr=point.score.half, fmt=mark,
            ms=7, color=colour, mfc=colour if point is arm.best else PAPER, mew=1.5, zorder=2,
            elinewidth=0.8, ecolor=(colour, 0.4),
        )  # fmt: skip


def _name_lines(axis: Axes, arms: Sequence[Arm], colours: Mapping[str, str]) -> None:
    """Write the name of each arm beside one of its markers, at the first place where it covers nothing."""
    from matplotlib.transforms import Bbox

    def box_of(point: Point, wide: float, high: float, around: float) -> Bbox:
        x, y = point.forgetting.value, point.score.value
        corners = [[max(x - wide, axis.get_xlim()[0]), y - high], [x + wide, y + high]]
        return Bbox(axis.transData.transform(corners)).padded(around)

    def write(arm: Arm, point: Point, dx: float, dy: float, ha: str, va: str) -> Annotation:
        return axis.annotate(
            label_of(arm.label), (point.forgetting.value, point.score.value), (dx, dy), textcoords="offset points",
            ha=ha, va=va, color=colours[arm.label], fontweight="bold",
        )  # fmt: skip

    everything = [point for arm in arms for point in arm.points]
    taken = [box_of(point, 0.0, 0.0, 14) for point in everything]
    bars = [box_of(point, 0.0, point.score.half or 0.0, 2) for point in everything]
    bars += [box_of(point, point.forgetting.half or 0.0, 0.0, 2) for point in everything]
    inside = axis.get_window_extent()
    for arm in arms:
        points = sorted(arm.points, key=lambda point: point is not arm.best)
        for obstacles, point, place in product(([*taken, *bars], taken), points, _beside()):  # last, across a bar
            name = write(arm, point, *place)
            box = name.get_window_extent()
            if inside.x0 <= box.x0 and box.x1 <= inside.x1 and not any(box.overlaps(other) for other in obstacles):
                taken.append(box)
                break
            name.remove()
        else:
            if points:
                write(arm, points[0], *next(_beside()))


def _beside() -> Iterator[tuple[float, float, str, str]]:
    """Yield the places of a name around a marker, the nearest first: offsets in points, and alignments."""
    for far in (7, 16, 25, 34, 43):
        yield from ((0, far, "center", "bottom"), (0, -far, "center", "top"))
        yield from ((far, far - 3, "left", "bottom"), (-far, far - 3, "right", "bottom"))
        yield from ((far, 3 - far, "left", "top"), (-far, 3 - far, "right", "top"))


def _logarithmic(axis: Axes, values: Sequence[Mean]) -> None:
    """Use a logarithmic x axis with plain tick labels: 0.5, 1, 2, and more of them for a short range."""
    from matplotlib.ticker import LogLocator, NullFormatter

    numbers = [mean.value for mean in values]
    if min(numbers, default=0.0) <= 0:
        return
    axis.set_xscale("log")
    axis.set_xlim(min(numbers) / 1.6, max(numbers) * 1.6)
    subs = (1, 2, 5) if max(numbers) > 6 * min(numbers) else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.xaxis.set_major_locator(LogLocator(subs=subs if max(numbers) < 1000 * min(numbers) else (1,)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def ratios_figure(panels: Mapping[str, Mapping[str, Ratio | None]], references: Iterable[str], title: str) -> Figure:
    """Draw forgetting at equal loss, relative to the panel's reference: one row per arm, one panel per task.

    One or two panels (of one task) are sorted by the first; of several tasks, the arms keep their order.
    """
    from matplotlib.figure import Figure

    names = set(references)
    reference = names.pop() if len(names) == 1 else None  # None: each panel has its own, with a row
    shown = [{arm: ratio for arm, ratio in ratios.items() if ratio and arm != reference} for ratios in panels.values()]
    labels = list(dict.fromkeys(label for ratios in shown for label in ratios))
    if len(panels) < 3:
        labels.sort(key=lambda label: shown[0][label].value if label in shown[0] else 0.0)
    values = [ratio.value for ratios in shown for ratio in ratios.values()] + [0.6, 1.7]
    low, high = min(values) / 1.5, max(values) * 1.5
    with styled():
        figure = Figure(figsize=(WIDTH, 1.4 + 0.27 * len(labels)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, name, ratios in zip(axes, panels, shown, strict=True):
            axis.axvline(1, color=GREY, lw=1, ls="--", zorder=0)
            for label, ratio in ratios.items():
                _ratio_row(axis, labels.index(label), ratio, method_colour(label) or INK, low, high)
            axis.set(xscale="log", xlim=(low, high * (high / low) ** 0.45), ylim=(max(len(labels), 1) - 0.5, -0.5))
            few = (0.5, 1, 2) if high < 12 * low else (0.25, 1, 4)
            ticks = [tick for tick in (few if high < 30 * low else (0.01, 0.1, 1, 10)) if low <= tick <= high]
            axis.set_xticks(ticks, [reference if reference and tick == 1 else f"{tick:g}×" for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.set_title(name, loc="left", fontsize=9.5)
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
        axes[0].set_yticks(range(len(labels)), labels)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        of = reference or "the reference"
        words = f"\N{LEFTWARDS ARROW} better.  Forgetting at equal validation loss, relative to {of}"
        if any(ratio.is_lower_bound for ratios in shown for ratio in ratios.values()):
            words += "; a triangle is a lower bound"
        figure.supxlabel(words, x=0.01, ha="left", fontsize=8.5, color=GREY)
    return figure


def _ratio_row(axis: Axes, row: int, ratio: Ratio, colour: str, low: float, high: float) -> None:
    if ratio.low is not None and ratio.high is not None:
        axis.plot([max(ratio.low, low), min(ratio.high, high)], [row, row], color=colour, lw=1.6, alpha=0.6)
    axis.plot(ratio.value, row, marker=">" if ratio.is_lower_bound else "o", color=colour, ms=6)
    number = ratio.text.partition(" (")[0]
    axis.text(0.99, row, number, transform=axis.get_yaxis_transform(), ha="right", va="center", color=INK)


def rates_figure(arms: Sequence[Arm]) -> Figure:
    """Draw validation loss, test score and forgetting over the learning rate, one line per method."""
    from matplotlib.figure import Figure

    panels = ("validation", "validation loss"), ("score", "score"), ("forgetting", "forgetting")
    labels = [arm.label for arm in arms]
    colours, marks = colours_of(labels), marks_of(labels)
    with styled():
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (field, name) in zip(axes, panels, strict=True):
            for arm in arms:
                means: list[Mean] = [getattr(point, field) for point in arm.points]
                axis.errorbar(
                    [p.learning_rate for p in arm.points], [m.value for m in means], yerr=[m.half or 0 for m in means],
                    color=colours[arm.label], marker=marks[arm.label], ms=5, lw=1.4, elinewidth=0.8, label=arm.label,
                )  # fmt: skip
            axis.set(xscale="log", xlabel="learning rate")
            axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper left", ncols=5)
    return figure
