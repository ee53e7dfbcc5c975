"""Result tables: the same cells for the terminal and as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from milora_eval.benchmark import Metric
from milora_eval.compare import Pair
from milora_eval.results import Results, metrics_of

if TYPE_CHECKING:
    from rich.table import Table as RichTable


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


def results_table(results: Results) -> Table:
    """Return one model's numbers: metric, n, baseline, value."""
    found = metrics_of(results)
    rows = tuple(
        (label(benchmark, name, found), f"{metric.n:,}", baseline(metric), value(metric))
        for (benchmark, name), metric in found.items()
    )
    return Table(_title(results), ("", "n", "baseline", results["which"]), rows, tuple(_notes(found)))


def pairs_table(title: str, pairs: Sequence[Pair], names: tuple[str, str]) -> Table:
    """Return two models side by side: metric, n, baseline, a, b, paired difference."""
    found = {(pair.benchmark, pair.b.name): pair.b for pair in pairs}
    rows = tuple(
        (
            label(pair.benchmark, pair.b.name, found),
            f"{pair.b.n:,}",
            baseline(pair.b),
            value(pair.a),
            value(pair.b),
            difference(pair),
        )
        for pair in pairs
    )
    return Table(title, ("", "n", "baseline", *names, "difference"), rows, tuple(_notes(found)))


def with_forgetting(table: Table, forgetting: Mapping[str, Any] | None) -> Table:
    """Return the table with the text-forgetting row and its explanation."""
    if not forgetting or len(table.header) != 6:
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


def label(benchmark: str, name: str, found: Mapping[tuple[str, str], Metric]) -> str:
    """Return a metric's name, with its benchmark where there are several."""
    return name if len({key[0] for key in found}) == 1 else f"{benchmark}: {name}"


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


def _notes(found: Mapping[tuple[str, str], Metric]) -> list[str]:
    notes = [f"{label(*key, found)}: {metric.note}" for key, metric in found.items() if metric.note]
    if any(metric.baseline is not None for metric in found.values()):
        notes.insert(0, "baseline: the most frequent answer, or the best fixed choice, without looking at the picture")
    return notes


def _title(results: Results) -> str:
    about = [f"{entry['name']} {entry['version']}, {entry['protocol']}" for entry in results["benchmarks"]]
    return "; ".join(about)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
