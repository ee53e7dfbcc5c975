"""Write the files of an analysis: layers.csv, summary.json, the figures, and one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from milora_vl.analyze import plots
from milora_vl.analyze.rows import Row
from milora_vl.common.atomic_write import write_json
from milora_vl.common.cli import page as pages
from milora_vl.common.cli.table import Table
from milora_vl.report.plots import draw, write_csv

# Heat maps: field -> (label of the colour bar, caption).
BASE_MAPS = {
    "effective_rank": ("effective rank", "exp of the entropy of σ / Σσ (Roy and Vetterli 2007)."),
    "minor_energy": ("share of ‖W‖²", "The share of ‖W‖² in the last r components."),
}
UPDATE_MAPS = {
    "relative_update": ("‖ΔW‖ / ‖W‖", "Size of the update, in Frobenius norms."),
    "amplification": (
        "amplification factor",
        "‖UᵀΔWV‖ / ‖UᵀWV‖ with U, V the top-r singular vectors of ΔW. A lower factor alone does not show that more "
        "was preserved: PiSSA has the lowest. Read it together with ‖UᵀWV‖ in the table above.",
    ),
    "similarity_bottom": ("similarity", "Subspace similarity of the left vectors of ΔW with the bottom r of W."),
    "similarity_top": ("similarity", "Subspace similarity of the left vectors of ΔW with the top r of W."),
    "intruders": ("number of the first 10", "Intruder dimensions: top left vectors of the tuned weight whose cosine "
                  "with every left vector of W is below 0.5 (arXiv:2410.21228, k = 10)."),
}  # fmt: skip
_BASE_FIELDS = {
    "effective rank": "effective_rank", "stable rank": "stable_rank", "decay exponent": "decay_exponent",
    "condition number": "condition_number", "minor share of ‖W‖²": "minor_energy",
}  # fmt: skip
_UPDATE_FIELDS = {
    "‖ΔW‖": "update_norm", "‖ΔW‖/‖W‖": "relative_update", "factor": "amplification", "‖UᵀΔWV‖": "update_inside",
    "‖UᵀWV‖": "base_inside", "top of W": "base_inside_top", "random": "base_inside_random",
    "like top": "similarity_top", "like bottom": "similarity_bottom", "like random": "similarity_random",
    "intruders": "intruders", "A moved": "moved_A", "B moved": "moved_B",
}  # fmt: skip


def write(folder: Path, kind: str, name: str, base: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Write all files of an analysis into `folder` and return the content of summary.json."""
    fields = _BASE_FIELDS if kind == "base" else _UPDATE_FIELDS
    means = {group: _means(members, fields) for group, members in plots.groups(rows).items()}
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "sigma"]
    write_csv(folder / "layers.csv", columns, [[row.get(key, "") for key in columns] for row in rows])
    figures = _figures(folder, kind, rows)
    table = _table(means, fields)
    summary: dict[str, Any] = {"kind": kind, "of": name, "base": base, "layers": len(rows), "means": means}
    summary["figures"] = [{"name": figure["name"], "caption": figure["caption"]} for figure in figures]
    summary["table"] = asdict(table)
    write_json(folder / "summary.json", summary)
    title = f"{name}" if kind == "base" else f"{name} on {base}"
    content = {"title": title, "lede": lede(kind, rows), "figures": figures, "table": table}
    pages.write(folder / "analysis.html", pages.render(Path(__file__).with_name("analysis.html.j2"), content))
    return summary


def lede(kind: str, rows: Sequence[Row]) -> str:
    """Return the result in one line: size of the update and similarity with directions of W, for each tower.

    A fully trained projector moves much more than an adapter, so one mean over both would describe neither.
    """
    if kind == "base":
        return f"The spectra of {len(rows):,} layers"
    towers = sorted(dict.fromkeys(row["tower"] for row in rows))  # language before projector and vision
    moved = [_moved(tower, [row for row in rows if row["tower"] == tower]) for tower in towers]
    return f"The training changed {', '.join(moved)}"


def _moved(tower: str, rows: Sequence[Row]) -> str:
    means = _means(rows, _UPDATE_FIELDS)
    words = f"{tower} ({len(rows):,} {'layer' if len(rows) == 1 else 'layers'})"
    if "relative_update" in means:
        words += f" by {100 * means['relative_update']:.2g} % of its norm"
    if "similarity_top" in means:
        bottom, top = means["similarity_bottom"], means["similarity_top"]
        words += f" (similarity with the last directions {bottom:.2f}, first {top:.2f})"
    return words


def _means(rows: Sequence[Row], fields: dict[str, str]) -> dict[str, float]:
    means = {}
    for field in fields.values():
        values = [row[field] for row in rows if row.get(field) is not None]
        if values:
            means[field] = sum(values) / len(values)
    return {"layers": len(rows), **means}


def _table(means: dict[str, dict[str, float]], fields: dict[str, str]) -> Table:
    shown = {head: field for head, field in fields.items() if any(field in row for row in means.values())}
    rows = [
        (name, f"{row['layers']:,}", *(f"{row[field]:.3g}" if field in row else "–" for field in shown.values()))
        for name, row in means.items()
    ]
    return Table(("part", "layers", *shown), tuple(rows), "Means over the layers of each part.")


def _figures(folder: Path, kind: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Draw the figures that the rows allow; return name, plot and caption of each in the order of the page."""
    if kind == "base":
        drawn = [
            (
                "spectra",
                plots.spectra_figure(rows),
                "Singular values of every layer. Darker lines are closer to the input.",
            ),
            (
                "minor-energy",
                plots.minor_energy_figure(rows),
                "Share of the last components in ‖W‖². The dotted line is a flat spectrum.",
            ),
        ]
    else:
        words = "Similarity between the left singular vectors of the update and of W, mean over the modules of a layer."
        drawn = [("similarity", plots.similarity_figure(rows), words)]
    maps = BASE_MAPS if kind == "base" else UPDATE_MAPS
    for field, (label, caption) in maps.items() if plots.has_map(rows) else ():
        if len({row[field] for row in rows if row.get(field) is not None}) > 1:  # a map with one value shows nothing
            drawn.append((f"heat-{field}", plots.heat_map(rows, field, label), caption))
    return [
        {"name": name, "plot": draw(folder, name, figure, caption, with_pdf=True), "caption": caption}
        for name, figure, caption in drawn
    ]
