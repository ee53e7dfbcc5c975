"""The tables of a report: what trained in which modules (by rule and by layer), forgetting and scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from milora_vl.common.cli.table import Table
from milora_vl.core.policy.rules import label_of, what_trains
from milora_vl.report.run_page import Comparison, Json, Run, Score, tasks_of
from milora_vl.report.wording import (
    amount,
    cut_words,
    forgetting_rows,
    gain,
    lowered_shares,
    method_name,
    number,
    percent,
)


def forgetting_table(forgetting: Json) -> Table:
    """Return a table with one row per probe of `python -m milora_vl.forgetting`, from its forgetting.json."""
    header = ("probe", "forgotten (KL)", "cross-entropy", "base entropy", "change of loss", "tokens in documents")
    caption = "Compared with the predictions of the base model, in nats per token, ± one standard error over documents."
    return Table(header, tuple(map(tuple, forgetting_rows(forgetting))), caption)


def policy_table(run: Run) -> Table:
    """Return a table with one row for all modules of equal settings."""
    targets = sorted(run.policy.get("targets", ()), key=_treatment)
    shares = {str(layer["path"]): layer.get("energy") for layer in run.policy.get("layers", ())}
    rows = []
    for (tower, method, rank, alpha, rate, protect), members in groupby(targets, key=_treatment):
        paths = [str(target["path"]) for target in members]
        energy = _span([100 * share for path in paths if (share := shares.get(path)) is not None])
        cells = (
            tower,
            f"{len(paths):,}",
            method_name(method, protect),
            _cell(rank or None),
            _cell(alpha or None),
            _cell(rate or None),
        )
        rows.append((*cells, f"{energy} %" if energy else "–"))
    trainable, total = run.policy.get("trainable"), run.policy.get("total")
    share = (
        f"{trainable:,} of {total:,} parameters train ({percent(trainable / total)})." if trainable and total else ""
    )
    header = ("tower", "modules", "method", "rank", "alpha", "learning rate", "share of ‖W‖² in the adapter")
    kinds = dict.fromkeys((str(target["method"]), target.get("protect") or 0.0) for target in targets)
    trains = [f"{label_of(method)}: {words}." for method, share in kinds if (words := what_trains(method, share))]
    caption = " ".join(["Trained modules by rule; all other modules are frozen.", *trains, share]).strip()
    return Table(header, tuple(rows), caption)


def protection_table(run: Run) -> Table:
    """Return a table with one row per tower that protects inputs; without rows if none does."""
    towers = {str(t["path"]): str(t["tower"]) for t in run.policy.get("targets", ())}
    entries = sorted(run.policy.get("protection", {}).items(), key=lambda entry: towers[entry[0]])
    rows = []
    for tower, members in groupby(entries, key=lambda entry: towers[entry[0]]):
        group = [protection for _, protection in members]
        columns = (
            [100 * entry["directions"] / entry["inputs"] for entry in group],
            [100 * entry["energy"] for entry in group],
            [100 * entry["held_out"] for entry in group if entry["held_out"] is not None],
            [100 * entry["kept"] for entry in group],
        )
        largest = max(entry["overlap"] for entry in group)
        rows.append((tower, f"{len(group):,}", *map(_mean_and_span, columns), f"{largest:.0e}"))
    header = (
        *("tower", "layers", "directions protected", "their activation energy", "the same on held-out text"),
        *("share of the start off them", "A along them"),
    )
    caption = (
        "Protected inputs: means over layers, with the range over layers. A is chosen off the protected directions and "
        "never changes; the last column is what rounding leaves of it along them, at most over layers. "
        + lowered_shares(run.policy)
    ).strip()
    return Table(header, tuple(rows), caption)


def _mean_and_span(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f} % ({_span(values)})" if values else "–"


def tasks_table(run: Run) -> Table:
    """Return a table with one row per task whose update the run holds; without rows unless it came after others."""
    rows = []
    for task in tasks_of(run.folder):
        of_towers = [
            f"{rule['tower']}: {method_name(rule['method'], rule['protect'])}"
            + (f", rank {rule['rank']}" if rule["rank"] else "")
            for rule in task["rules"]
        ]
        path = task["data"].get("path")
        name = path if isinstance(path, str) else "several files" if path else "–"
        rows.append((str(task["run"]), name, f"{task['records']:,}" if task["records"] else "–", "; ".join(of_towers)))
    caption = "The tasks that this run has learned, in order. One LoRA holds their updates: ranks add."
    return Table(("run", "data", "records", "what trained"), tuple(rows), caption)


def earlier_table(run: Run) -> Table:
    """Return a table with one row per benchmark of the earlier runs; without rows if the run came after none."""
    rows = [
        (str(each.run), each.score.benchmark, number(each.score.before), number(each.score.after), gain(each.score))
        for each in run.earlier
    ]
    caption = "Earlier runs: their scores, and this run's on the same questions. Brackets show one standard error."
    return Table(("earlier run", "benchmark", "its score", "after this run", "change"), tuple(rows), caption)


def score_tables(comparison: Comparison) -> list[Table]:
    """Return one table per benchmark, headline first, with a column of notes if any score has one."""
    tables = []
    after = comparison.after.which if comparison.after else "final"
    for _, group in groupby(comparison.scores, key=lambda score: score.benchmark):
        scores = list(group)
        notes = [_note(score) for score in scores]
        rows = []
        for score, note in zip(scores, notes, strict=True):
            baseline = "–" if score.any.baseline is None else amount(score.any.baseline, score.any.unit)
            cells = (score.label, number(score.before), number(score.after), gain(score), baseline, f"{score.any.n:,}")
            rows.append((*cells, note) if any(notes) else cells)
        header = ("score", "base", "tuned" if after == "final" else after, "change", "majority answer", "questions")
        tables.append(
            Table((*header, "note") if any(notes) else header, tuple(rows), _about(comparison, scores[0].benchmark))
        )
    return tables


def _about(comparison: Comparison, benchmark: str) -> str:
    """Return the caption of a table: benchmark, version, split and protocol."""
    side = comparison.after or comparison.before
    entry: Json = next((b for b in (side.results["benchmarks"] if side else ()) if b["name"] == benchmark), {})
    parts = [f"{benchmark}, version {entry['version']}" if entry.get("version") else benchmark]
    parts += [f"{entry['split']} split"] if entry.get("split") else []
    parts += [str(entry["protocol"])] if entry.get("protocol") else []
    cut = cut_words(comparison, benchmark)
    return "; ".join(parts) + ". Brackets show one standard error." + (f" {cut}" if cut else "")


def _note(score: Score) -> str:
    """Return the notes of a score: the note of the benchmark, and a warning for a score below the majority answer."""
    metric, notes = score.any, [score.any.note] if score.any.note else []
    if metric.baseline is not None and score.after and score.after.value < metric.baseline:
        notes.append("below the majority answer")
    return "; ".join(notes)


def _treatment(target: Json) -> tuple[str, str, int, float, float, float]:
    numbers = (target.get("rank") or 0, target.get("alpha") or 0.0, target.get("learning_rate") or 0.0)
    return (str(target.get("tower") or "–"), str(target["method"]), *numbers, target.get("protect") or 0.0)


def _span(values: Iterable[float]) -> str:
    """Return the range of some numbers with two digits; empty without numbers.

    >>> _span([0.31, 0.587]), _span([2.0])
    ('0.31 – 0.59', '2')
    """
    ordered = sorted(values)
    ends = dict.fromkeys(f"{value:.2g}" for value in (ordered[0], ordered[-1])) if ordered else ()
    return " – ".join(ends)


def _cell(value: Any) -> str:
    """Return any value of a JSON file as short text."""
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return (f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}".replace(".00e", "e")).replace(
            "e-0", "e-"
        )
    if isinstance(value, list | tuple):
        return " × ".join(_cell(item) for item in value)
    return str(value)
