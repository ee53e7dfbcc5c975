"""Result tables for the terminal, as markdown and as LaTeX, all with the same cells."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_eval.answers.store import PREDICTIONS
from milora_eval.benchmark import Metric
from milora_eval.scores.compare import Pair, compare
from milora_eval.scores.results import TABLE, Results, metrics_of, read_results, require_lines
from milora_vl.base.atomic_write import write_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable

FORMATS = ("human", "markdown", "latex", "json")
_LATEX = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "_": r"\_",
        "#": r"\#",
        "$": r"\$",
        "±": r"$\pm$",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column is a name. `notes` appear below the table."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the table as markdown, with its title and notes."""
        lines = [f"**{self.title}**", "", _row(self.header), "|---|" + "---:|" * (len(self.header) - 1)]
        lines += [_row(row) for row in self.rows]
        lines += ["", *(f"{note}  " for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self) -> str:
        """Return a LaTeX tabular (booktabs) with the title and the notes as comments."""
        lines = [f"% {self.title}", rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}", r"\toprule"]
        body = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in (self.header, *self.rows)]
        lines += [body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"]
        return "\n".join([*lines, *(f"% {note}" for note in self.notes)]) + "\n"

    def rich(self) -> RichTable:
        """Return the table for rich's console."""
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for place, name in enumerate(self.header):
            table.add_column(name, justify="right" if place else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table


def show(table: Table, form: str) -> None:
    """Print a table to stdout as human, markdown or latex."""
    if form != "human":
        sys.stdout.write(table.markdown() if form == "markdown" else table.latex())
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)  # names may hold [ ] and :
    console.print(table.rich())
    for note in table.notes:
        console.print(note, style="dim", highlight=False)


def write_table(folder: Path) -> Table:
    """Write table.md next to results.json and return the table; it compares with the base if its answers exist."""
    results = read_results(folder)
    base = folder.parent / "base"
    table = results_table(results)
    if results.get("which") not in ("base", None) and (base / PREDICTIONS).is_file():
        names = ("base", "tuned" if results["which"] == "final" else results["which"])
        means = (read_results(base).get("mean"), results.get("mean"))
        pairs = compare(require_lines(base), require_lines(folder))
        table = pairs_table(table.title, pairs, names, means)
    table = with_forgetting(table, results.get("forgetting"))
    write_text(folder / TABLE, table.markdown())
    return table


def results_table(results: Results) -> Table:
    """Return the table of one model: metric, n, baseline, value. For several benchmarks also protocol and version."""
    metrics = shown(metrics_of(results))
    rows: list[tuple[str, ...]] = [
        (label(benchmark, name, metrics), f"{metric.n:,}", baseline(metric), value(metric))
        for (benchmark, name), metric in metrics.items()
    ]
    header: tuple[str, ...] = ("", "n", "baseline", results["which"])
    notes = _notes(metrics, results)
    entries = {entry["name"]: entry for entry in results["benchmarks"]}
    if len(entries) > 1:
        about = [(entries[name]["protocol"], entries[name]["version"]) for name, _ in metrics]
        header = (*header, "protocol", "version")
        rows = [(*row, *more) for row, more in zip(rows, about, strict=True)]
    if results.get("mean"):
        blank = ("",) * (len(header) - 4)
        rows.insert(0, (mean_label(results["mean"]), "", "", repr(results["mean"]["value"]), *blank))
    return Table(_title(results), header, tuple(rows), tuple(notes))


def pairs_table(title: str, pairs: Sequence[Pair], names: tuple[str, str], means: Sequence[Any] = ()) -> Table:
    """Return the table of two models: metric, n, baseline, a, b, paired difference.

    `means` are the means of the suite for both models; they make the first row, unrounded.
    """
    pairs = [pair for pair in pairs if not pair.b.detail]
    metrics = {(pair.benchmark, pair.b.name): pair.b for pair in pairs}
    rows = [
        (
            label(pair.benchmark, pair.b.name, metrics),
            f"{pair.b.n:,}",
            baseline(pair.b),
            value(pair.a),
            value(pair.b),
            difference(pair),
        )
        for pair in pairs
    ]
    if means and all(means):
        a, b = (entry["value"] for entry in means)
        rows.insert(0, (mean_label(means[1]), "", "", repr(a), repr(b), f"{b - a:+}"))
    return Table(title, ("", "n", "baseline", *names, "difference"), tuple(rows), tuple(_notes(metrics)))


def with_forgetting(table: Table, forgetting: Mapping[str, Any] | None) -> Table:
    """Return the table with the text-forgetting row and its note."""
    if not forgetting or "difference" not in table.header:
        return table
    row = (
        "text forgetting",
        f"{forgetting['n_tokens']:,}",
        "",
        _nats(forgetting["base_entropy"], None),
        _nats(forgetting["cross_entropy"], forgetting["stderr"]),
        "+" + _nats(forgetting["kl"], forgetting["kl_stderr"]),
    )
    note = (
        "text forgetting: cross-entropy against the base model's predictions on general text, nats per token; "
        "its minimum is the entropy of the base model"
    )
    return replace(table, rows=(*table.rows, row), notes=(*table.notes, note))


def shown(metrics: Mapping[tuple[str, str], Metric]) -> dict[tuple[str, str], Metric]:
    """Return the metrics that a table shows, without the details."""
    return {key: metric for key, metric in metrics.items() if not metric.detail}


def label(benchmark: str, name: str, metrics: Mapping[tuple[str, str], Metric]) -> str:
    """Return the name of a metric, with its benchmark if there are several."""
    return name if len({key[0] for key in metrics}) == 1 else f"{benchmark}: {name}"


def mean_label(entry: Mapping[str, Any]) -> str:
    """Return the name of a suite's mean."""
    return f"mean of {len(entry['of'])}"


def value(metric: Metric) -> str:
    """Return a value with its standard error; without it if all answers have the same score.

    >>> value(Metric("accuracy", 0.5, 0.012, 100)), value(Metric("accuracy", 1.0, 0.0, 2))
    ('50.0 ± 1.2', '100.0')
    """
    scale = _scale(metric)
    text = f"{scale * metric.value:.1f}"
    return f"{text} ± {scale * metric.stderr:.1f}" if metric.stderr else text


def baseline(metric: Metric) -> str:
    """Return the baseline of a metric, an empty text if it has none."""
    return "" if metric.baseline is None else f"{_scale(metric) * metric.baseline:.1f}"


def difference(pair: Pair) -> str:
    """Return b minus a, with the paired standard error if there is one."""
    scale, paired = _scale(pair.b), pair.difference
    if paired is None:
        return f"{scale * (pair.b.value - pair.a.value):+.1f}"
    text = f"{scale * paired.value:+.1f}"
    return f"{text} ± {scale * paired.stderr:.1f}" if paired.stderr else text


def _nats(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def _scale(metric: Metric) -> float:
    return 100.0 if metric.unit == "fraction" else 1.0


def _notes(metrics: Mapping[tuple[str, str], Metric], results: Mapping[str, Any] | None = None) -> list[str]:
    notes = [f"{label(*key, metrics)}: {metric.note}" for key, metric in metrics.items() if metric.note]
    if any(metric.baseline is not None for metric in metrics.values()):
        notes.insert(0, "baseline: the most frequent answer, or the best fixed choice, without looking at the picture")
    for entry in (results or {}).get("benchmarks", ()):
        if not entry["metrics"]:
            notes.append(f"{entry['name']}: {entry['n']:,} answers, scored by a server or a judge (docs/evaluation.md)")
    return notes


def _title(results: Results) -> str:
    entries = results["benchmarks"]
    if len(entries) > 1:
        return f"suite {results['suite']}, {len(entries)} benchmarks"
    return "; ".join(f"{entry['name']} {entry['version']}, {entry['protocol']}" for entry in entries)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
