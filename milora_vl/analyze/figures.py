"""Write the files of an analysis: layers.csv, summary.json with the table of means, and the figures as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_vl.analyze.layers import LayerRow
from milora_vl.common.atomic_write import write_json
from milora_vl.common.cli.table import Table
from milora_vl.report.plots import METHOD_COLOURS, colours_of, draw, page_figure, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Figures over the layers: field -> (its name, caption).
_OVER_LAYERS = {
    "relative_update": ("‖ΔW‖ / ‖W‖", "Size of the update, in Frobenius norms."),
    "amplification": (
        "amplification factor",
        "‖UᵀΔWV‖ / ‖UᵀWV‖ with U, V the top-r singular vectors of ΔW. A lower factor alone does not show that more "
        "was preserved: PiSSA has the lowest. Read it together with ‖UᵀWV‖ in the table above.",
    ),
    "intruders": ("number of the first 10", "Intruder dimensions: top left vectors of the tuned weight whose cosine "
                  "with every left vector of W is below 0.5 (arXiv:2410.21228, k = 10)."),
}  # fmt: skip
# The columns of the table: heading -> field.
_FIELDS = {
    "‖ΔW‖": "update_norm", "‖ΔW‖/‖W‖": "relative_update", "factor": "amplification", "‖UᵀΔWV‖": "update_inside",
    "‖UᵀWV‖": "base_inside", "top of W": "base_inside_top", "random": "base_inside_random",
    "like top": "similarity_top", "like bottom": "similarity_bottom", "like random": "similarity_random",
    "intruders": "intruders", "A moved": "moved_A", "B moved": "moved_B",
}  # fmt: skip


def write(folder: Path, of: dict[str, Any], rows: Sequence[LayerRow]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(folder / "layers.csv", columns, [[row.get(key, "") for key in columns] for row in rows])
    groups: dict[str, list[LayerRow]] = {}  # language attention, language mlp, projector, ...
    for row in sorted(rows, key=lambda row: (row["tower"], row["family"])):
        name = row["tower"] if row["family"] == row["tower"] else f"{row['tower']} {row['family']}"
        groups.setdefault(name, []).append(row)
    means = {
        name: {field: sum(found) / len(found) for field in _FIELDS.values() if (found := _values(members, field))}
        for name, members in groups.items()
    }
    shown = {head: field for head, field in _FIELDS.items() if any(field in of_group for of_group in means.values())}
    cells = [
        (name, f"{len(groups[name]):,}", *(f"{values[f]:.3g}" if f in values else "–" for f in shown.values()))
        for name, values in means.items()
    ]
    table = Table(("part", "layers", *shown), tuple(cells), "Means over the layers of each part.")
    figures = _figures(groups)
    for name, (figure, _) in figures.items():
        draw(folder, name, figure)
    captions = [{"name": name, "caption": caption} for name, (_, caption) in figures.items()]
    summary = of | {"layers": len(rows), "means": means, "figures": captions, "table": asdict(table)}
    write_json(folder / "summary.json", summary)
    return summary


def _values(rows: Sequence[LayerRow], field: str) -> list[float]:
    return [row[field] for row in rows if row.get(field) is not None]


def _figures(groups: dict[str, list[LayerRow]]) -> dict[str, tuple[Figure, str]]:
    """Draw the figures that the rows allow; return figure and caption of each by name, in the order of the page."""
    rows = [row for members in groups.values() for row in members]
    deep = {name: members for name, members in groups.items() if len({row["block"] for row in members}) > 1}
    words = "Similarity between the left singular vectors of the update and of W, mean over the modules of a layer."
    drawn = {"similarity": (_panels(deep or groups, _draw_similarities, "layer", "subspace similarity"), words)}
    for field, (name, caption) in _OVER_LAYERS.items() if deep else ():
        if len(set(_values(rows, field))) > 1:  # a figure with one value shows nothing
            words = f"{caption} One line per module."
            drawn[field.replace("_", "-")] = _panels(deep, partial(_draw_field, field), "layer", name), words
    return drawn


def _panels(
    groups: dict[str, list[LayerRow]], draw_one: Callable[[Axes, Sequence[LayerRow]], None], xlabel: str, ylabel: str
) -> Figure:
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    lines = -(-len(groups) // columns)
    with page_figure(2.5 * lines + 0.2) as figure:
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axis in axes[len(groups) :]:
            axis.set_visible(False)
        for position, (axis, (name, rows)) in enumerate(zip(axes, groups.items(), strict=False)):
            draw_one(axis, rows)
            axis.set_title(name.replace("mlp", "MLP"), loc="left", fontsize=10, fontweight="bold")
            axis.set_ylabel(ylabel if position % columns == 0 else "")
            axis.set_xlabel(xlabel if position + columns >= len(groups) else "")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
    return figure


def _draw_similarities(axis: Axes, rows: Sequence[LayerRow]) -> None:
    """Draw the similarity of the update with W's top, bottom and random subspace, over the blocks (paper, Fig. 2)."""
    blocks = sorted({row["block"] or 0 for row in rows})
    for part, method, mark in (("top", "pissa", "o"), ("bottom", "milora", "s"), ("random", "random", "")):
        values = [[row[f"similarity_{part}"] for row in rows if (row["block"] or 0) == block] for block in blocks]
        means = [sum(each) / len(each) for each in values]
        axis.plot(blocks, means, color=METHOD_COLOURS[method], marker=mark, lw=1.4, ms=3.5, label=f"{part} of W")
    axis.locator_params(axis="x", integer=True)
    axis.set_ylim(bottom=0)


def _draw_field(field: str, axis: Axes, rows: Sequence[LayerRow]) -> None:
    modules = list(dict.fromkeys(row["module"].split(".")[-1] for row in rows))
    for module, colour in colours_of(modules).items():
        inside = [row for row in rows if row["module"].split(".")[-1] == module and row.get(field) is not None]
        inside.sort(key=lambda row: row["block"] or 0)
        values = [row[field] for row in inside]
        axis.plot([row["block"] or 0 for row in inside], values, color=colour, lw=1.4, marker="o", ms=3, label=module)
    axis.locator_params(axis="x", integer=True)
