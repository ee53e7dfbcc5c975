"""A trade-off as a table, as rows of a .csv, and as a plot: gain over what changed elsewhere, or tasks over runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from milora_eval.scores.table import difference, value
from milora_eval.scores.tradeoff import Mean, Tradeoff, change
from milora_vl.common.cli.command_line import amount
from milora_vl.common.cli.table import Table
from milora_vl.report.plots import GREY, INK, WIDTH, colours_of, marks_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CSV_HEADER = ("run", "part", "benchmark", "metric", "n", "base", "score", "change", "stderr", "low", "high")


def table(result: Tradeoff) -> Table:
    """Return one row per benchmark: its score on the base, and the change of each run; then the means.

    A sequence begins with the score of each target after each run.
    """
    first = result.stages[0]
    rows: list[tuple[str, ...]] = []
    for name in result.targets if result.sequence else ():
        scores = (value(stage.pairs[name].b) for stage in result.stages)
        rows.append((f"score: {name}", f"{first.pairs[name].b.n:,}", value(first.pairs[name].a), *scores))
    for part, names in (("target", result.targets), ("held out", result.held_out)):
        for name in names:
            changes = (difference(stage.pairs[name]) for stage in result.stages)
            rows.append((f"{part}: {name}", f"{first.pairs[name].b.n:,}", value(first.pairs[name].a), *changes))
    so_far = " so far" if result.sequence else ""
    rows += _mean_rows(f"mean of targets{so_far}", [stage.gain for stage in result.stages])
    if result.held_out:
        rows += _mean_rows(f"mean of {len(result.held_out)} held out", [stage.held_out for stage in result.stages])
    notes = ["±: standard error of the paired difference. The errors of the means treat the benchmarks as independent."]
    means = [each for stage in result.stages for each in (stage.gain, *([stage.held_out] if result.held_out else []))]
    if result.sequence is not None:
        blank = [Mean(None)] * (len(result.stages) - 1)
        final, average, backward = result.sequence.final, Mean(result.sequence.average), result.sequence.backward
        rows += _mean_rows("final accuracy", [*blank, final], sign="")
        rows += _mean_rows("average over the stages", [*blank, average], sign="")
        rows += _mean_rows("backward transfer", [*blank, backward])
        notes.append(
            "final accuracy and backward transfer: arXiv:1706.08840; average over the stages: arXiv:1611.07725"
        )
        means.append(backward)
    notes += dict.fromkeys(each.note for each in means if each.note)
    header = ("", "n", "base", *(stage.name for stage in result.stages))
    title = f"change against the base: {amount(len(result.targets), 'target')}, {len(result.held_out)} held out"
    return Table(header, tuple(rows), "\n".join([*notes, *result.notes]), title)


def csv_rows(result: Tradeoff) -> Iterator[tuple[object, ...]]:
    """Yield the rows of the .csv, in percent or points; the benchmark of a mean is empty."""
    for stage in result.stages:
        for part, names in (("target", result.targets), ("held out", result.held_out)):
            for name in names:
                pair = stage.pairs[name]
                scale, paired = 100.0 if pair.b.unit == "fraction" else 1.0, pair.difference
                low_high = (None,) * 3 if paired is None else (paired.stderr, paired.low, paired.high)
                numbers = (pair.a.value, pair.b.value, pair.b.value - pair.a.value, *low_high)
                scaled = (None if number is None else scale * number for number in numbers)
                yield stage.name, part, name, pair.b.name, pair.b.n, *scaled
        for part, each in (("target", stage.gain), ("held out", stage.held_out)):
            yield stage.name, part, "", "mean", "", "", "", each.value, each.stderr, each.low, each.high
    if result.sequence is not None:
        last, final, moved = result.stages[-1].name, result.sequence.final, result.sequence.backward
        yield last, "sequence", "", "final accuracy", "", "", final.value, "", final.stderr, "", ""
        yield last, "sequence", "", "average over the stages", "", "", result.sequence.average, "", "", "", ""
        yield last, "sequence", "", "backward transfer", "", "", "", moved.value, moved.stderr, moved.low, moved.high


def figure(result: Tradeoff) -> Figure:
    """Draw the change of every benchmark beside the mean gain over the mean change elsewhere, one mark per run.

    A sequence has the scores of its targets over the runs in place of the means.
    """
    from matplotlib.figure import Figure

    names = (*result.targets, *result.held_out)
    runs = [stage.name for stage in result.stages]
    colours, marks = colours_of(runs), marks_of(runs)
    with styled():
        drawn = Figure(figsize=(WIDTH, max(3.4, 1.0 + 0.3 * len(names))), layout="constrained")
        means, each = drawn.subplots(1, 2, width_ratios=(1, 1.15))
        if result.sequence is None:
            _means_panel(means, result, colours, marks)
        else:
            _scores_panel(means, result, colours, marks)
        for place, stage in enumerate(result.stages):
            apart = min(0.2, 0.6 / len(result.stages))
            rows = [row + apart * (place - (len(result.stages) - 1) / 2) for row in range(len(names))]
            pairs = [stage.pairs[name] for name in names]
            errors = [_scale(pair.b.unit) * ((pair.difference.stderr if pair.difference else 0) or 0) for pair in pairs]
            each.errorbar(
                [change(pair) for pair in pairs], rows, xerr=errors, fmt=marks[stage.name], color=colours[stage.name],
                ms=5, elinewidth=1, label=stage.name,
            )  # fmt: skip
        each.axvline(0, color=GREY, lw=0.8)
        if result.held_out:
            each.axhline(len(result.targets) - 0.5, color=GREY, lw=0.8, ls=":")
        each.set_yticks(range(len(names)), names)
        for label in each.get_yticklabels()[: len(result.targets)]:
            label.set_fontweight("bold")
        each.set(ylim=(len(names) - 0.4, -0.6), xlabel="change against the base, % or points (bold: targets)")
        each.tick_params(axis="y", length=0)
        if len(result.stages) > 1:
            drawn.legend(*each.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return drawn


def _means_panel(axis: Axes, result: Tradeoff, colours: Mapping[str, str], marks: Mapping[str, str]) -> None:
    places = [(_place(stage.held_out), _place(stage.gain)) for stage in result.stages]
    for place, stage in enumerate(result.stages):
        axis.errorbar(
            *places[place], xerr=_reach(stage.held_out), yerr=_reach(stage.gain), fmt=marks[stage.name],
            color=colours[stage.name], ms=7, elinewidth=1,
        )  # fmt: skip
    axis.plot(0, 0, marker="+", color=INK, ms=9)
    axis.annotate("base", (0, 0), xytext=(5, -11), textcoords="offset points", fontsize=8)
    axis.axhline(0, color=GREY, lw=0.8, zorder=0)
    axis.axvline(0, color=GREY, lw=0.8, zorder=0)
    axis.margins(0.12)
    axis.set_title("better \N{NORTH EAST ARROW}", loc="right", color=GREY, fontsize=9.5)
    axis.set(xlabel="change on what is held out, %", ylabel="gain on the targets, %")


def _scores_panel(axis: Axes, result: Tradeoff, colours: Mapping[str, str], marks: Mapping[str, str]) -> None:
    """Draw one line per target, with colour and mark of the run that learned it: the score before and after each."""
    for learned, name in enumerate(result.targets, start=1):
        run = result.stages[learned - 1].name
        colour = colours[run]
        pairs = [stage.pairs[name] for stage in result.stages]
        scores = [100 * metric.value for metric in (pairs[0].a, *(pair.b for pair in pairs))]
        axis.plot(scores, color=colour, marker=marks[run], ms=6, markevery=[learned], lw=1.4)
        axis.annotate(
            name, (len(pairs), scores[-1]), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8,
            color=colour,
        )  # fmt: skip
    axis.set_xticks(range(len(result.stages) + 1), ["base", *(stage.name for stage in result.stages)])
    axis.margins(x=0.12)
    axis.set(xlabel="after the run (mark: that learned this target)", ylabel="score, %")


def _scale(unit: str) -> float:
    return 100.0 if unit == "fraction" else 1.0


def _place(each: Mean) -> float:
    """Return the value; nan, which is not drawn, without one."""
    return math.nan if each.value is None else each.value


def _reach(each: Mean) -> float:
    """Return half of the 95 % interval, 0 without one."""
    return 0.0 if each.low is None or each.value is None else each.value - each.low


def _mean_rows(name: str, means: Sequence[Mean], sign: str = "+") -> list[tuple[str, ...]]:
    """Return a row of means with their errors, and one of their intervals if there are any."""
    cells = [_cell(each, sign) for each in means]
    spans = ["" if each.low is None else f"{each.low:+.1f} to {each.high:+.1f}" for each in means]
    return [(name, "", "", *cells), *([("  95 % interval", "", "", *spans)] if any(spans) else [])]


def _cell(each: Mean, sign: str) -> str:
    if each.value is None:
        return ""
    return f"{each.value:{sign}.1f}" + (f" ± {each.stderr:.1f}" if each.stderr else "")
