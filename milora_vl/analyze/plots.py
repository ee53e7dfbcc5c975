"""Heat maps (layer x module) and curves of an analysis, drawn with Matplotlib in the style of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from milora_vl.analyze.rows import Row
from milora_vl.report.plots import GREY, METHOD_COLOURS, WIDTH, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_MODULES = 14  # a heat map with more columns is not readable


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows by tower and family, sorted by name: `language attention`, `language mlp`, `projector`, ..."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        name = row["tower"] if row["family"] == row["tower"] else f"{row['tower']} {row['family']}"
        by_name.setdefault(name, []).append(row)
    return dict(sorted(by_name.items()))


def has_map(rows: Sequence[Row]) -> list[str]:
    """Return the towers for which a heat map is possible: those with several blocks of the same modules."""
    towers = []
    for tower in dict.fromkeys(row["tower"] for row in rows):
        inside = [row for row in rows if row["tower"] == tower and row["block"] is not None]
        modules, blocks = {row["module"] for row in inside}, {row["block"] for row in inside}
        if len(blocks) > 1 and len(modules) <= _MOST_MODULES:
            towers.append(str(tower))
    return sorted(towers)


def heat_map(rows: Sequence[Row], field: str, label: str) -> Figure:
    """Draw `field` of every layer: modules across, blocks downward, one panel per tower. Missing cells stay empty."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    towers = has_map(rows)
    values = [row[field] for row in rows if row["tower"] in towers and row.get(field) is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    norm: Any = LogNorm(low, high) if low > 0 and high > 20 * low else Normalize(min(low, 0.0), high or 1.0)
    shapes = [_grid(rows, tower, field) for tower in towers]
    with styled():
        height = 1.3 + 0.11 * max(len(blocks) for _, blocks, _ in shapes)
        figure = Figure(figsize=(WIDTH, height + 0.4), layout="constrained")
        axes = list(figure.subplots(1, len(towers), squeeze=False).flat)
        for axis, tower, (modules, blocks, cells) in zip(axes, towers, shapes, strict=True):
            image = axis.imshow(cells, norm=norm, cmap="viridis", aspect="auto", interpolation="none")
            axis.set_xticks(range(len(modules)), [_short(name) for name in modules], rotation=45, ha="right")
            step = max(1, len(blocks) // 8)
            axis.set_yticks(range(0, len(blocks), step), blocks[::step])
            axis.set_title(tower, loc="left", fontsize=10, fontweight="bold")
            axis.set_ylabel("layer")
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, label=label, aspect=30, shrink=0.9)
        bar.outline.set_visible(False)
    return figure


def spectra_figure(rows: Sequence[Row]) -> Figure:
    """Draw sigma_i / sigma_1 of every layer over its relative position, one panel per family, coloured by depth."""
    return _panels(groups(rows), _spectra_panel, "position, largest first, %", "σ / σ₁")


def minor_energy_figure(rows: Sequence[Row]) -> Figure:
    """Draw the share of ||W||_F^2 in the last r components over r / k, one line per layer, one panel per family."""
    return _panels(groups(rows), _minor_panel, "last components, %", "share of ‖W‖², %")


def similarity_figure(rows: Sequence[Row]) -> Figure:
    """Draw the similarity of the update with W's top, bottom and random subspace, over the blocks (paper, Fig. 2)."""
    inside = {
        name: members for name, members in groups(rows).items() if any(row["block"] is not None for row in members)
    }
    return _panels(inside or groups(rows), _similarity_panel, "layer", "subspace similarity", legend=True)


def _panels(rows_of: dict[str, list[Row]], draw: Any, xlabel: str, ylabel: str, *, legend: bool = False) -> Figure:
    from matplotlib.figure import Figure

    columns = 2 if len(rows_of) == 4 else min(3, len(rows_of))
    lines = -(-len(rows_of) // columns)
    with styled():
        figure = Figure(figsize=(WIDTH, 2.5 * lines + 0.2), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(rows_of) :]:
            axis.set_visible(False)
        for axis, (name, rows) in zip(axes.flat, rows_of.items(), strict=False):
            draw(axis, rows)
            axis.set_title(name.replace("mlp", "MLP"), loc="left", fontsize=10, fontweight="bold")
        for axis in axes[:, 0]:
            axis.set_ylabel(ylabel)
        for position, axis in enumerate(axes.flat[: len(rows_of)]):
            if position + columns >= len(rows_of):
                axis.set_xlabel(xlabel)
        if legend:
            handles, labels = axes.flat[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=3, columnspacing=1.2)
    return figure


def _spectra_panel(axis: Axes, rows: Sequence[Row]) -> None:
    for row, colour in zip(rows, _by_depth(rows), strict=True):
        count, first = len(row["sigma"]), row["sigma"][0] or 1.0
        share = [max(value / first, 1e-7) for value in row["sigma"]]
        axis.plot([100 * i / count for i in range(1, count + 1)], share, color=colour, lw=0.8, alpha=0.8)
    axis.set(yscale="log", xlim=(0, 100), ylim=(None, 1.2))


def _minor_panel(axis: Axes, rows: Sequence[Row]) -> None:
    for row, colour in zip(rows, _by_depth(rows), strict=True):
        x, y = minor_curve(row["sigma"])
        axis.plot(x, y, color=colour, lw=0.8, alpha=0.8)
    axis.plot([0, 100], [0, 100], color=GREY, lw=1, ls=":", zorder=0)
    axis.set(xlim=(0, 100), ylim=(0, 100))


def minor_curve(sigma: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the share of the last components, and their share in ||W||_F^2, both in percent.

    >>> minor_curve([3.0, 1.0])
    ([0.0, 50.0, 100.0], [0.0, 10.0, 100.0])
    """
    total, held, shares = sum(value * value for value in sigma) or 1.0, 0.0, [0.0]
    for value in reversed(sigma):
        held += value * value
        shares.append(100 * held / total)
    return [100 * i / len(sigma) for i in range(len(sigma) + 1)], shares


def _similarity_panel(axis: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    for field, name, colour, mark in (
        ("similarity_top", "top", METHOD_COLOURS["pissa"], "o"),
        ("similarity_bottom", "bottom", METHOD_COLOURS["milora"], "s"),
        ("similarity_random", "random", METHOD_COLOURS["random"], None),
    ):
        blocks: dict[int, list[float]] = {}
        for row in rows:
            blocks.setdefault(row["block"] or 0, []).append(row[field])
        means = [sum(values) / len(values) for _, values in sorted(blocks.items())]
        line = {"ls": ":"} if mark is None else {"marker": mark, "ms": 3.5}
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.plot(sorted(blocks), means, color=colour, lw=1.4, label=f"{name} of W", **line)
    axis.set_ylim(bottom=0)


def _by_depth(rows: Sequence[Row]) -> list[Any]:
    """Return one colour per row, from the first block to the last."""
    from matplotlib import colormaps

    last = max([row["block"] or 0 for row in rows] + [1])
    return [colormaps["viridis"](0.92 * (row["block"] or 0) / last) for row in rows]


def _grid(rows: Sequence[Row], tower: str, field: str) -> tuple[list[str], list[int], list[list[float]]]:
    """Return modules, blocks and the field as (blocks, modules), with NaN for missing cells."""
    inside = [row for row in rows if row["tower"] == tower and row["block"] is not None]
    modules = list(dict.fromkeys(str(row["module"]) for row in inside))
    blocks = sorted({int(row["block"]) for row in inside})
    cells: dict[Any, Any] = {(row["block"], row["module"]): row.get(field) for row in inside}
    nan = float("nan")
    return modules, blocks, [[nan if cells.get((b, m)) is None else cells[b, m] for m in modules] for b in blocks]


def _short(module: str) -> str:
    """Return the last distinctive part of a module's path, such as `q_proj`."""
    words = module.split(".")
    return words[-1] if not words[-1].isdecimal() else ".".join(words[-2:])
