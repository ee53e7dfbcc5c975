"""The tables of results: one model, a model beside its base, two evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora_eval.answers.store import PREDICTIONS
from milora_eval.benchmark import Metric
from milora_eval.scores.compare import Pair, compare
from milora_eval.scores.results import TABLE, Results, metrics_of, read_results, require_lines
from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.table import Table


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
    return Table(header, tuple(rows), "\n".join(notes), _title(results))


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
    return Table(("", "n", "baseline", *names, "difference"), tuple(rows), "\n".join(_notes(metrics)), title)


def with_forgetting(table: Table, forgetting: Mapping[str, Any] | None) -> Table:
    """Return the table with the text-forgetting row and its note."""
    if not forgetting:
        return table
    change = _nats(forgetting["kl"], forgetting["kl_stderr"])
    cells: tuple[str, ...] = (change,)
    note = "text forgetting: KL divergence from the base model on general text, nats per token"
    if "difference" in table.header:
        tuned = _nats(forgetting["cross_entropy"], forgetting["stderr"])
        cells = (_nats(forgetting["base_entropy"], None), tuned, "+" + change)
        note = (
            "text forgetting: cross-entropy against the base model's predictions on general text, nats per token; "
            "its minimum is the entropy of the base model"
        )
    row = ("text forgetting", f"{forgetting['n_tokens']:,}", "", *cells)
    row += ("",) * (len(table.header) - len(row))
    return replace(table, rows=(*table.rows, row), caption="\n".join(filter(None, (table.caption, note))))


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
