"""Result tables: the same cells for the terminal, as markdown and as LaTeX."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from milora_eval.benchmark import Metric
from milora_eval.scores.compare import Pair
from milora_eval.scores.results import Results, metrics_of

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
    """Cells as text, the first column a name; `notes` go below."""

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
        """Return a tabular for a LaTeX document (booktabs), title and notes as comments."""
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
    """Print a table to stdout: human, markdown or latex."""
    if form != "human":
        sys.stdout.write(table.markdown() if form == "markdown" else table.latex())
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)  # names may hold [ ] and :
    console.print(table.rich())
    for note in table.notes:
        console.print(note, style="dim", highlight=False)


def results_table(results: Results) -> Table:
    """Return one model's numbers: metric, n, baseline, value; with several benchmarks, their protocol and version."""
    found = shown(metrics_of(results))
    rows: list[tuple[str, ...]] = [
        (label(benchmark, name, found), f"{metric.n:,}", baseline(metric), value(metric))
        for (benchmark, name), metric in found.items()
    ]
    header: tuple[str, ...] = ("", "n", "baseline", results["which"])
    notes = _notes(found, results)
    entries = {entry["name"]: entry for entry in results["benchmarks"]}
    if len(entries) > 1:
        about = [(entries[name]["protocol"], entries[name]["version"]) for name, _ in found]
        header = (*header, "protocol", "version")
        rows = [(*row, *more) for row, more in zip(rows, about, strict=True)]
    if results.get("mean"):
        blank = ("",) * (len(header) - 4)
        rows.insert(0, (mean_label(results["mean"]), "", "", repr(results["mean"]["value"]), *blank))
    return Table(_title(results), header, tuple(rows), tuple(notes))


def pairs_table(title: str, pairs: Sequence[Pair], names: tuple[str, str], means: Sequence[Any] = ()) -> Table:
    """Return two models side by side: metric, n, baseline, a, b, paired difference.

    `means`: the suite's mean of both, for a first row; unrounded like that of one model.
    """
    pairs = [pair for pair in pairs if not pair.b.detail]
    found = {(pair.benchmark, pair.b.name): pair.b for pair in pairs}
    rows = [
        (
            label(pair.benchmark, pair.b.name, found),
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
    return Table(title, ("", "n", "baseline", *names, "difference"), tuple(rows), tuple(_notes(found)))


def with_forgetting(table: Table, forgetting: Mapping[str, Any] | None) -> Table:
    """Return the table with the text-forgetting row and its explanation."""
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
        "text forgetting: cross-entropy against the base model's own predictions on general text, nats per token; "
        "the base's entropy is its floor"
    )
    return replace(table, rows=(*table.rows, row), notes=(*table.notes, note))


def shown(found: Mapping[tuple[str, str], Metric]) -> dict[tuple[str, str], Metric]:
    """Return the metrics that stand in a table: not the details."""
    return {key: metric for key, metric in found.items() if not metric.detail}


def label(benchmark: str, name: str, found: Mapping[tuple[str, str], Metric]) -> str:
    """Return a metric's name, with its benchmark where there are several."""
    return name if len({key[0] for key in found}) == 1 else f"{benchmark}: {name}"


def mean_label(entry: Mapping[str, Any]) -> str:
    """Return the name of a suite's mean."""
    return f"mean of {len(entry['of'])}"


def value(metric: Metric) -> str:
    """Return a value with its standard error.

    >>> value(Metric("accuracy", 0.5, 0.012, 100))
    '50.0 ± 1.2'
    """
    scale = _scale(metric)
    text = f"{scale * metric.value:.1f}"
    return text if metric.stderr is None else f"{text} ± {scale * metric.stderr:.1f}"


def baseline(metric: Metric) -> str:
    """Return a metric's baseline, a blank where it has none."""
    return "" if metric.baseline is None else f"{_scale(metric) * metric.baseline:.1f}"


def difference(pair: Pair) -> str:
    """Return b minus a with the paired standard error, where there is one."""
    scale, found = _scale(pair.b), pair.difference
    if found is None:
        return f"{scale * (pair.b.value - pair.a.value):+.1f}"
    text = f"{scale * found.value:+.1f}"
    return text if found.stderr is None else f"{text} ± {scale * found.stderr:.1f}"


def _nats(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def _scale(metric: Metric) -> float:
    return 100.0 if metric.unit == "fraction" else 1.0


def _notes(found: Mapping[tuple[str, str], Metric], results: Mapping[str, Any] | None = None) -> list[str]:
    notes = [f"{label(*key, found)}: {metric.note}" for key, metric in found.items() if metric.note]
    if any(metric.baseline is not None for metric in found.values()):
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
