"""What a run prints about its policy: the table of rules, protected inputs, trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_model_param_count

from milora_vl.common.cli.screen import Screen
from milora_vl.common.cli.table import drawn
from milora_vl.core.adapter.fixed_a import Protection
from milora_vl.core.adapter.initialize import LayerReport
from milora_vl.core.policy import Target
from milora_vl.core.policy.resolve import Selector
from milora_vl.core.policy.rules import what_trains
from milora_vl.core.policy.towers import TOWERS, find_towers

COLUMNS = ("modules", "number", "method", "rank", "alpha", "parameters", "rate", "energy", "trains")


def show_policy(screen: Screen, rows: Sequence[tuple[str, ...]], frozen: Sequence[str]) -> None:
    cells = [row[:-1] for row in rows] + [(tower, "-", "frozen", *[""] * 5) for tower in frozen]
    drawn(screen.console, COLUMNS[:-1], cells, left=("modules", "method"))
    for modules, *_, trains in rows:
        screen.say(f"{modules}: {trains}")


def policy_rows(
    rules: Sequence[Mapping[str, Any]],
    targets: Sequence[Target],
    sizes: Mapping[str, int],
    base: nn.Module,
    report: Sequence[LayerReport] = (),
) -> list[tuple[str, ...]]:
    """Return one row per rule that is the last one about some modules, with its selector as written.

    The targets have resolved rates. `sizes` maps the path of a target to its number of trained parameters, `report`
    holds measurements of the adapters. A rule about layers that earlier rules set apart shows the range of a value.
    """
    selector, last, by_path = Selector(base, find_towers(base)), dict[str, int](), {t.path: t for t in targets}
    for number, rule in enumerate(rules):
        whole = rule.get("method") in ("full", "frozen")
        last |= dict.fromkeys(selector.match(rule["modules"], whole_modules=whole, planned=last.keys()), number)
    energies = {layer.path: 100 * layer.energy for layer in report}
    rows: list[tuple[str, ...]] = []
    for number, rule in enumerate(rules):
        group = [by_path[path] for path, other in last.items() if other == number and path in by_path]
        if not group:
            continue
        rows.append(
            (
                rule["modules"],
                f"{len(group):,}",
                " ".join(sorted({target.method for target in group})),
                _span([target.rank for target in group if target.rank]),
                _span([target.alpha for target in group if target.alpha]),
                f"{sum(sizes[target.path] for target in group):,}",
                _span([target.learning_rate or 0.0 for target in group]),
                _span([energies[target.path] for target in group if target.path in energies], "{:.2g}", " %"),
                what_trains(group[0].method, group[0].protect),
            )
        )
    return rows


def _span(values: Sequence[float], form: str = "{:g}", unit: str = "") -> str:
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return (low if low == high else f"{low} - {high}") + unit


def protected_directions(targets: Sequence[Target], protection: Mapping[str, Protection]) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for target in targets:
        if target.path in protection:
            entry = protection[target.path]
            shares.setdefault(target.tower or "other", []).append(entry.directions / entry.inputs)
    return {tower: round(sum(values) / len(values), 4) for tower, values in shares.items()}


def protection_lines(targets: Sequence[Target], protection: Mapping[str, Protection]) -> list[str]:
    """Return one line per tower about its protected inputs: means over layers of their shares."""
    lines = []
    for tower in TOWERS:
        members = [protection[t.path] for t in targets if t.tower == tower and t.path in protection]
        if not members:
            continue
        held_out = [entry.held_out for entry in members if entry.held_out is not None]
        line = (
            f"protected inputs  {tower}: {_mean([entry.directions / entry.inputs for entry in members])} of the "
            f"directions, {_mean([entry.energy for entry in members])} of the energy"
        )
        lines.append(line + (f", {_mean(held_out)} on held-out text" if held_out else ""))
    return lines


def _mean(shares: Sequence[float]) -> str:
    return f"{sum(shares) / len(shares):.1%}"


def frozen_towers(base: nn.Module, targets: Sequence[Target]) -> list[str]:
    towers, trained = find_towers(base), {target.tower for target in targets}
    present = {"language": towers.language, "projector": towers.projector, "vision": towers.vision}
    return [tower for tower in TOWERS if present[tower] is not None and tower not in trained]


def trained_sizes(targets: Sequence[Target], base: nn.Module) -> dict[str, int]:
    """Return the number of trained parameters of each target by path: those of its adapter, else all.

    A tied head counts 0: it shares the weight of the embeddings.
    """
    sizes: dict[str, int] = {}
    seen: set[nn.Parameter] = set()
    for target in targets:
        module = base.get_submodule(target.path)
        if target.rank:
            sizes[target.path] = adapter_size(target)
            continue
        weight = next(module.parameters())
        sizes[target.path] = 0 if weight in seen else get_model_param_count(module)
        seen.add(weight)
    return sizes


def adapter_size(target: Target) -> int:
    """Return the number of trained parameters of an adapter: r (in + out), with exceptions.

    A fixed A leaves B, and DoRA trains one more number for each row of the weight.
    """
    rows, columns = target.shape
    assert target.rank is not None
    if target.has_fixed_A:
        return target.rank * rows
    return target.rank * (rows + columns) + (rows if target.method == "dora" else 0)


def trainable_line(trained: int, total: int) -> str:
    """Return PEFT's line about trained parameters, word for word, because users grep it.

    >>> trainable_line(1, 8)
    'trainable params: 1 || all params: 8 || trainable%: 12.5000'
    """
    return f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}"
