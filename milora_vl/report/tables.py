"""The tables of a report (scores, forgetting, tasks, what trained by rule and by layer), and its numbers as text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from milora_vl.common.cli.table import Table
from milora_vl.core.policy.rules import label_of, what_trains
from milora_vl.report.read_run import Json, RunFiles, Score, SuiteScores, in_units, is_fraction, tasks_of


def percent(share: float) -> str:
    """Return a share in percent, with one decimal from 1 % on, else with two digits.

    >>> percent(0.0339), percent(0.5614), percent(0.000123)
    ('3.4 %', '56.1 %', '0.012 %')
    """
    return f"{100 * share:.1f} %" if abs(share) >= 0.01 else f"{100 * share:.2g} %"


def amount(metric: Json, value: float) -> str:
    return f"{in_units(metric, value):,.1f}" + (" %" if is_fraction(metric) else "")


def number(metric: Json | None) -> str:
    """Return a stored metric with its standard error.

    >>> number({"value": 0.6123, "stderr": 0.0141})
    '61.2 % (±1.4)'
    """
    if metric is None:
        return "–"
    # A standard error of 0 comes from equal scores and is not informative.
    stderr = metric.get("stderr")
    spread = f" (±{in_units(metric, stderr):,.1f})" if stderr else ""
    return amount(metric, metric["value"]) + spread


def points(metric: Json, difference: float, sign: str = "+") -> str:
    return f"{in_units(metric, difference):{sign},.1f}".replace("-", "−")


def change(score: Score) -> str:
    """Return the difference of two scores on the same questions."""
    if score.before is None or score.after is None:
        return "–"
    return points(score.any, score.after["value"] - score.before["value"])


def lowered_shares(policy: Json) -> str:
    """Return a sentence about layers that protect less than their rule asks for; empty without such layers.

    >>> targets = [{"path": "q", "protect": 0.95}, {"path": "k", "protect": 0.95}]
    >>> lowered_shares({"targets": targets, "protection": {"q": {"energy": 0.91}, "k": {"energy": 0.96}}})
    'Layers that protect less than their rule asks for, so that their rank fits: 1 of 2; the lowest share is 91.0 %.'
    """
    asked = {target["path"]: target.get("protect", 0) for target in policy.get("targets", ())}
    found = {path: protection["energy"] for path, protection in policy.get("protection", {}).items()}
    lowered = [share for path, share in found.items() if share < asked[path]]
    if not lowered:
        return ""
    return (
        "Layers that protect less than their rule asks for, so that their rank fits: "
        f"{len(lowered):,} of {len(found):,}; the lowest share is {percent(min(lowered))}."
    )


def cut(comparison: SuiteScores, benchmark: str) -> str:
    """Return how many answers were cut at the token limit, in one sentence; empty if none was."""
    parts = []
    paired = comparison.paired.get(benchmark)
    for number, side in enumerate((comparison.before, comparison.after)):
        entry = next((each for each in side.results["benchmarks"] if each["name"] == benchmark), None) if side else None
        if side is None or entry is None:
            continue
        num_cut, num = (paired["cut"][number], paired["n"]) if paired else (entry.get("truncated"), entry["n"])
        if num_cut:
            limit = side.results["generation"]["max_new_tokens"][benchmark]
            who = ("the base model", "the fine-tuned model")[number]
            parts.append(f"{num_cut:,} of the {num:,} answers of {who} were cut at {limit:,} tokens")
    return f"{' and '.join(parts)}." if parts else ""


def earlier_table(run: RunFiles) -> Table:
    """Return a table with one row per benchmark of the earlier runs; without rows if the run came after none."""
    rows = tuple(
        (str(folder), score.benchmark, number(score.before), number(score.after), change(score))
        for folder, score in run.earlier
    )
    caption = "Earlier runs: their scores, and this run's on the same questions. Brackets show one standard error."
    return Table(("earlier run", "benchmark", "its score", "after this run", "change"), rows, caption)


def tasks_table(run: RunFiles) -> Table:
    """Return a table with one row per task whose update the run holds; without rows unless it came after others."""
    rows = []
    for task in tasks_of(run.folder):
        of_towers = [
            f"{rule['tower']}: {label_of(rule['method'], rule['protect'])}"
            + (f", rank {rule['rank']}" if rule["rank"] else "")
            for rule in task["rules"]
        ]
        path = task["data"].get("path")
        name = path if isinstance(path, str) else "several files" if path else "–"
        rows.append((str(task["run"]), name, f"{task['records']:,}" if task["records"] else "–", "; ".join(of_towers)))
    caption = "The tasks that this run has learned, in order. One LoRA holds their updates: ranks add."
    return Table(("run", "data", "records", "what trained"), tuple(rows), caption)


def policy_table(run: RunFiles) -> Table:

    def settings(target: Json) -> tuple[Any, ...]:
        numbers = (target.get(name) or 0.0 for name in ("rank", "alpha", "learning_rate", "protect"))
        return (str(target.get("tower") or "–"), str(target["method"]), *numbers)

    targets = sorted(run.policy.get("targets", ()), key=settings)
    energies = {str(layer["path"]): layer.get("energy") for layer in run.policy.get("layers", ())}
    rows = []
    for (tower, method, rank, alpha, rate, protect), members in groupby(targets, key=settings):
        paths = [str(target["path"]) for target in members]
        energy = _span([100 * share for path in paths if (share := energies.get(path)) is not None])
        numbers = (f"{rank}" if rank else "–", f"{alpha:.3g}" if alpha else "–", _rate(rate))
        name = label_of(method, protect)
        rows.append((tower, f"{len(paths):,}", name, *numbers, f"{energy} %" if energy else "–"))
    kinds = dict.fromkeys((str(target["method"]), target.get("protect") or 0.0) for target in targets)
    caption = ["Trained modules by rule; all other modules are frozen."]
    caption += [f"{label_of(*kind)}: {words}." for kind in kinds if (words := what_trains(*kind))]
    trainable, total = run.policy.get("trainable"), run.policy.get("total")
    if trainable and total:
        caption.append(f"{trainable:,} of {total:,} parameters train ({percent(trainable / total)}).")
    header = ("tower", "modules", "method", "rank", "alpha", "learning rate", "share of ‖W‖² in the adapter")
    return Table(header, tuple(rows), " ".join(caption))


def _rate(rate: float) -> str:
    text = f"{rate:.3g}" if rate >= 1e-3 else f"{rate:.2e}".replace(".00e", "e")
    return text.replace("e-0", "e-") if rate else "–"


def protection_table(run: RunFiles) -> Table:
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
        shares = (f"{sum(each) / len(each):.1f} % ({_span(each)})" if each else "–" for each in columns)
        rows.append((tower, f"{len(group):,}", *shares, f"{max(entry['overlap'] for entry in group):.0e}"))
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


def _span(values: Iterable[float]) -> str:
    """Return the range of some numbers with two digits; empty without numbers.

    >>> _span([0.31, 0.587]), _span([2.0])
    ('0.31 – 0.59', '2')
    """
    ordered = sorted(values)
    ends = dict.fromkeys(f"{value:.2g}" for value in (ordered[0], ordered[-1])) if ordered else ()
    return " – ".join(ends)


def forgetting_table(*measured: Json) -> Table:
    """Return a table with one row per probe of an evaluation or of `python -m milora_vl.forgetting`."""
    probes = [found for each in measured for found in (each.get("text"), each.get("pictures")) if found]
    rows = {
        (
            found["text"].replace("_", " "),
            _with_error(found["kl"], found["kl_stderr"]),
            _with_error(found["cross_entropy"], found["stderr"]),
            f"{found['base_entropy']:.3f}",
            _with_error(found["loss_change"], found["loss_change_stderr"], sign="+"),
            f"{found['n_tokens']:,} in {found['n_documents']:,}",
        ): None
        for found in probes
    }
    header = ("probe", "forgotten (KL)", "cross-entropy", "base entropy", "change of loss", "tokens in documents")
    caption = "Compared with the predictions of the base model, in nats per token, ± one standard error over documents."
    return Table(header, tuple(rows), caption)


def scales_table(measured: Json) -> Table:
    """Return a table with one row per scale that `export --scale auto` measured; without rows if it did not run."""
    rows = tuple(
        (f"{scale:g}" + " (chosen)" * (scale == measured["chosen"]), f"{loss:.4f}", f"{forgotten:.4f}")
        for scale, loss, forgotten in (point.values() for point in measured.get("scales", ()))
    )
    caption = (
        f"In nats per token: the loss of {measured.get('num_records', 0):,} held-out records, and the KL from the base "
        "model on general text. Chosen is the smallest scale that keeps 95 % of the fall of the loss."
    )
    return Table(("scale of the update", "held-out loss", "forgotten (KL)"), rows, caption)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
