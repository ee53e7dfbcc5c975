"""The tables of a report: what happened to which modules, one row a rule and one row a layer, and the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from milora_vl.report.run_page import Comparison, Json, Run, Score
from milora_vl.report.wording import METHODS, amount, forgetting_rows, gain, number, percent

# Of the layer table: heading, and how its cell is made from an entry of policy.json's `layers`.
_LAYER_COLUMNS: dict[str, Callable[[Json], str]] = {
    "layer": lambda layer: str(layer["path"]),
    "size": lambda layer: _cell(layer.get("shape")),
    "method": lambda layer: METHODS.get(str(layer.get("method")), _cell(layer.get("method"))),
    "rank": lambda layer: _cell(layer.get("rank")),
    "σ trained": lambda layer: _span([layer[key] for key in ("sigma_min", "sigma_max") if layer.get(key) is not None]),
    "σ largest": lambda layer: _cell(layer.get("sigma_top")),
    "share of ‖W‖²": lambda layer: "–" if layer.get("energy") is None else percent(layer["energy"]),
    "excess": lambda layer: _cell(layer.get("excess")),
    "step-0 drift": lambda layer: _cell(layer.get("drift")),
    "SVD": lambda layer: _cell(layer.get("svd")),
    "seconds": lambda layer: _cell(layer.get("seconds")),
}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text, the first of a row being its name."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


def forgetting_table(run: Run) -> Table:
    """One row for each probe of `python -m milora_vl.forgetting`."""
    header = ("on", "forgotten (KL)", "cross-entropy", "base entropy", "change of loss", "tokens in documents")
    caption = "Against the base model’s own predictions, nats a token, ± one standard error over documents."
    return Table(header, tuple(tuple(row) for row in forgetting_rows(run)), caption)


def policy_table(run: Run) -> Table:
    """One row for all modules that were treated alike."""
    targets = sorted(run.policy.get("targets", ()), key=_treatment)
    shares = {str(layer["path"]): layer.get("energy") for layer in run.policy.get("layers", ())}
    rows = []
    for (tower, method, rank, alpha, rate, protected), members in groupby(targets, key=_treatment):
        paths = [str(target["path"]) for target in members]
        energy = _span([100 * share for path in paths if (share := shares.get(path)) is not None])
        cells = (
            tower,
            f"{len(paths):,}",
            METHODS.get(method, method) + protected,
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
    return Table(header, tuple(rows), f"What was done to which modules; what is not listed is frozen. {share}".strip())


def layer_table(run: Run) -> Table:
    """One row a layer, with everything that was measured when its adapter was made."""
    layers: Sequence[Json] = run.policy.get("layers", ())
    return Table(
        tuple(_LAYER_COLUMNS), tuple(tuple(cell(layer) for cell in _LAYER_COLUMNS.values()) for layer in layers)
    )


def score_tables(comparison: Comparison) -> list[Table]:
    """One table a benchmark, the headline first; a column of notes where something must be said."""
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
    """Which rules and which split a table's numbers follow."""
    side = comparison.after or comparison.before
    found: Json = next((b for b in (side.results["benchmarks"] if side else ()) if b["name"] == benchmark), {})
    parts = [f"{benchmark}, version {found['version']}" if found.get("version") else benchmark]
    parts += [f"{found['split']} split"] if found.get("split") else []
    parts += [str(found["protocol"])] if found.get("protocol") else []
    return "; ".join(parts) + ". In brackets one standard error."


def _note(score: Score) -> str:
    """What must be said beside a score: the benchmark's own note, and a score no better than not looking."""
    metric, notes = score.any, [score.any.note] if score.any.note else []
    if metric.baseline is not None and score.after and score.after.value < metric.baseline:
        notes.append("below the majority answer")
    return "; ".join(notes)


def _treatment(target: Json) -> tuple[str, str, int, float, float, str]:
    numbers = (target.get("rank") or 0, target.get("alpha") or 0.0, target.get("learning_rate") or 0.0)
    return (str(target.get("tower") or "–"), str(target["method"]), *numbers, _protected(target.get("protect")))


def _protected(protect: Json | None) -> str:
    """What a rule's `protect` adds to its method.

    >>> _protected({"top": 64, "by": "penalty", "weight": 500.0})
    ', outside the top 64 by penalty 500'
    """
    if not protect:
        return ""
    weight = protect.get("weight")
    return f", outside the top {protect['top']} by {protect['by']}" + (f" {_cell(weight)}" if weight else "")


def _span(values: Iterable[float]) -> str:
    """The range of some numbers to two digits, empty for none.

    >>> _span([0.31, 0.587]), _span([2.0])
    ('0.31 – 0.59', '2')
    """
    found = sorted(values)
    ends = dict.fromkeys(f"{value:.2g}" for value in (found[0], found[-1])) if found else ()
    return " – ".join(ends)


def _cell(value: Any) -> str:
    """Any value of a JSON file, short."""
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return (f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}".replace(".00e", "e")).replace(
            "e-0", "e-"
        )
    if isinstance(value, list | tuple):
        return " × ".join(_cell(item) for item in value)
    return str(value)
