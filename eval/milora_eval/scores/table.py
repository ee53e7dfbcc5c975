"""The tables of results: one model, a model beside its base, several sizes of an update, runs beside a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from milora_eval.answers.store import PREDICTIONS, Line, each_line, expected_of, to_answer, write_lines
from milora_eval.benchmark import Metric
from milora_eval.registry import stored_benchmark
from milora_eval.scores.compare import Comparison, Mean, Pair, store_comparison, stored_pairs
from milora_eval.scores.results import (
    TABLE,
    Results,
    check_ids,
    headlines,
    metrics_of,
    numbers,
    read_results,
    require_answers,
    write_results,
)
from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.console import amount
from milora_vl.common.cli.table import Table

Keyed = Mapping[tuple[str, str], Metric]


def score(folder: str | Path) -> Results:
    """Score the stored answers of an evaluation again, without its model, and rewrite its results.json and table.md.

    Raises UserError if the folder has no answers, or if answers are duplicated or missing.
    """
    folder = Path(folder)
    require_answers(folder)
    before = read_results(folder)
    check_ids(folder, before)
    benchmark_of = cache(stored_benchmark)

    def rescored() -> Iterator[Line]:
        for line in each_line(folder / PREDICTIONS):
            benchmark, answer = benchmark_of(line["benchmark"]), to_answer(line | {"correct": None})
            with expected_of(benchmark, line["id"]):
                yield line | {"correct": benchmark.score(answer.item, answer.text)}

    write_lines(folder / PREDICTIONS, rescored())
    about = {"suite": folder.absolute().parent.name, "which": folder.absolute().name} | before
    write_results(folder, about | numbers(folder, str(about["suite"])))
    write_tables(folder)
    return read_results(folder)


def write_tables(folder: Path) -> None:
    """Compare an evaluation with its base, and write the table of each folder whose comparison is new."""
    for each in store_comparison(folder):
        write_table(each)


def write_table(folder: Path) -> Table:
    """Write and return the table of an evaluation, beside its base if it is compared: table.md, and in results.json."""
    results = read_results(folder)
    table = results_table(results)
    if comparison := results.get("comparison"):
        names = ("base", "tuned" if results["which"] == "final" else results["which"])
        pairs, notes = stored_pairs(comparison), comparison["notes"]
        table = pairs_table(table.title, pairs, names, comparison["means"]) if pairs else table
        table = replace(table, caption="\n".join(filter(None, (table.caption, *notes))))
    table = with_forgetting(table, results.get("forgetting"))
    write_text(folder / TABLE, table.markdown())
    write_results(folder, results | {"table": asdict(table)})
    return table


def results_table(results: Results) -> Table:
    """Return the table of one model: metric, n, baseline, value. For several benchmarks also protocol and version."""
    metrics = {key: metric for key, metric in metrics_of(results).items() if not metric.detail}
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


def scales_table(sizes: Mapping[float, Results], suite: str) -> Table:
    has_pictures = any((results.get("forgetting") or {}).get("pictures") for results in sizes.values())
    probes = ("text forgetting", *(("picture forgetting",) if has_pictures else ()))
    header, rows = ("scale", *probes), []
    for scale, results in sizes.items():
        metrics, forgetting = headlines(results), results.get("forgetting")
        header = ("scale", *probes, *(f"{name}: {metric.name}" for name, metric in metrics.items()))
        found = (forgetting, (forgetting or {}).get("pictures"))[: len(probes)]
        kept = [_nats(f["kl"], f["kl_stderr"], 4) if f else "0.0000" if scale == 0 else "" for f in found]
        rows.append((f"{scale:g}", *kept, *map(value, metrics.values())))
    note = "forgetting: KL divergence from the base model on general text and on its answers, nats per token"
    return Table(header, tuple(rows), note, f"suite {suite}: sizes of the update")


def runs_table(result: Comparison) -> Table:
    """Return one row per benchmark: its score on the base, and the change of each run; then the means."""
    first, rows, means = result.runs[0], list[tuple[str, ...]](), list[Mean]()
    for part, names in (("target: ", result.targets), ("held out: " if result.targets else "", result.held_out)):
        for name in names:
            pair = first.pairs[name]
            changes = (difference(run.pairs[name]) for run in result.runs)
            rows.append((part + name, f"{pair.b.n:,}", value(pair.a), *changes))
    if result.targets:
        means += [run.gain for run in result.runs]
        rows += _mean_rows("mean of targets", means)
    if result.held_out:
        kept = [run.held_out for run in result.runs]
        rows += _mean_rows(f"mean of {len(result.held_out)}{' held out' if result.targets else ''}", kept)
        means += kept
    notes = ["±: standard error of the paired difference. The errors of the means treat the benchmarks as independent."]
    notes += dict.fromkeys(each.note for each in means if each.note)
    header = ("", "n", "base", *(run.name for run in result.runs))
    title = "change against the base"
    if result.targets:
        title += f": {amount(len(result.targets), 'target')}, {len(result.held_out)} held out"
    return Table(header, tuple(rows), "\n".join([*notes, *result.notes]), title)


def _mean_rows(name: str, means: Sequence[Mean]) -> list[tuple[str, ...]]:
    cells = ["" if each.value is None else _with_error(f"{each.value:+.1f}", each.stderr) for each in means]
    spans = ["" if each.low is None else f"{each.low:+.1f} to {each.high:+.1f}" for each in means]
    return [(name, "", "", *cells), *([("  95 % interval", "", "", *spans)] if any(spans) else [])]


def with_forgetting(table: Table, forgetting: Mapping[str, Any] | None) -> Table:
    if not forgetting:
        return table
    is_pair, rows = "difference" in table.header, list[tuple[str, ...]]()
    for name, found in (("text forgetting", forgetting), ("picture forgetting", forgetting.get("pictures"))):
        if found:
            cells: tuple[str, ...] = (_nats(found["kl"], found["kl_stderr"]),)
            if is_pair:
                tuned = _nats(found["cross_entropy"], found["stderr"])
                cells = (_nats(found["base_entropy"], None), tuned, f"+{cells[0]}")
            row = (name, f"{found['n_tokens']:,}", "", *cells)
            rows.append(row + ("",) * (len(table.header) - len(row)))
    what = "cross-entropy against the base model's predictions" if is_pair else "KL divergence from the base model"
    note = f"forgetting: {what}, on general text and on its answers about drawn shapes, nats per token"
    return replace(table, rows=(*table.rows, *rows), caption="\n".join(filter(None, (table.caption, note))))


def label(benchmark: str, name: str, metrics: Keyed) -> str:
    return name if len({key[0] for key in metrics}) == 1 else f"{benchmark}: {name}"


def mean_label(entry: Mapping[str, Any]) -> str:
    return f"mean of {len(entry['of'])}"


def value(metric: Metric) -> str:
    """Return a value with its standard error; without it if all answers have the same score.

    >>> value(Metric("accuracy", 0.5, 0.012, 100)), value(Metric("accuracy", 1.0, 0.0, 2))
    ('50.0 ± 1.2', '100.0')
    """
    return _with_error(f"{metric.scale * metric.value:.1f}", metric.scale * (metric.stderr or 0.0))


def baseline(metric: Metric) -> str:
    return "" if metric.baseline is None else f"{metric.scale * metric.baseline:.1f}"


def difference(pair: Pair) -> str:
    paired = pair.difference
    change = pair.change if paired is None else pair.b.scale * paired.value
    return _with_error(f"{change:+.1f}", pair.b.scale * (paired.stderr or 0.0) if paired else None)


def _with_error(text: str, stderr: float | None) -> str:
    return f"{text} ± {stderr:.1f}" if stderr else text


def _nats(value: float, stderr: float | None, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if stderr is None else f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _notes(metrics: Keyed, results: Mapping[str, Any] | None = None) -> list[str]:
    notes = [f"{label(*key, metrics)}: {metric.note}" for key, metric in metrics.items() if metric.note]
    if any(metric.baseline is not None for metric in metrics.values()):
        notes.insert(0, "baseline: the most frequent answer, or the best fixed choice, without looking at the picture")
    for entry in (results or {}).get("benchmarks", ()):
        if not entry["metrics"]:
            where = "by a server or an official script, which read submission/ (docs/evaluate.md)"
            notes.append(f"{entry['name']}: {entry['n']:,} answers, scored {where}")
    return notes


def _title(results: Results) -> str:
    entries = results["benchmarks"]
    if len(entries) > 1:
        return f"suite {results['suite']}, {len(entries)} benchmarks"
    return "; ".join(f"{entry['name']} {entry['version']}, {entry['protocol']}" for entry in entries)
