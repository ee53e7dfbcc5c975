"""The terminal output of a run: header, policy table, warnings, slow steps, trainable parameters, closing block.

Only rank 0 writes. Colour appears only on a terminal; rich follows NO_COLOR and COLUMNS.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from milora_vl.core.policy.rules import what_trains
from milora_vl.core.policy.towers import TOWERS, Towers, find_towers

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from milora_vl.core.adapter.fixed_a import Protection
    from milora_vl.core.adapter.initialize import LayerReport
    from milora_vl.core.policy import Target

Rows = Sequence[tuple[str, str]]
COLUMNS = (
    "tower", "modules", "method", "rank", "alpha", "parameters", "rate", "trained sigma / max", "energy", "trains",
)  # fmt: skip


class Screen:
    """All output of a run except HF's progress bar."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        quiet = os.environ.get("RANK", "0") != "0"
        self.console: Console = Console(file=stream or sys.stderr, quiet=quiet, highlight=False)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = 110  # a log file needs no narrow lines

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Announce a slow step, and print its time."""
        self.console.print(f"{what} ...", markup=False, soft_wrap=True)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if seconds >= 1:
            self.console.print(f"  done in {seconds:.0f} s", markup=False)

    def block(self, rows: Rows) -> None:
        """Print rows with a name each: what a run is at its start, and where everything is at its end."""
        width = max(len(name) for name, _ in rows)
        self.console.print()
        for name, value in rows:
            self.say(f"{name:<{width}}  {value}")

    def policy(self, rows: Sequence[tuple[str, ...]], frozen: Sequence[str]) -> None:
        """Print the table of trained modules (see `policy_rows`) with the frozen towers, then what trains in words."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in COLUMNS[:-1]:
            table.add_column(name, justify="left" if name in ("tower", "method") else "right")
        for *cells, _ in rows:
            table.add_row(*cells)
        for tower in frozen:
            table.add_row(tower, "-", "frozen")
        self.console.print(table)
        for names, *_, trains in rows:
            self.say(f"{', '.join(names.splitlines())}: {trains}")


def policy_rows(
    targets: Sequence[Target], sizes: Mapping[str, int], base: nn.Module, report: Sequence[LayerReport] = ()
) -> list[tuple[str, ...]]:
    """Return one row per (tower, method, rank, alpha, learning rate, protected share), in order of the towers.

    A row with some of the targets of a tower has their selectors as its name. The targets have resolved rates
    (`rates.in_force`). `sizes` maps the path of a target to its number of trained parameters, `report` holds
    measurements of the adapters.
    """
    towers = find_towers(base)
    measured = {layer.path: layer for layer in report}
    ordered = sorted(targets, key=_kind)
    rows: list[tuple[str, ...]] = []
    for kind, members in groupby(ordered, key=_kind):
        group = list(members)
        _, method, rank, alpha, rate, protect = kind
        layers = [measured[t.path] for t in group if t.path in measured]
        shares = [s / layer.sigma_top for layer in layers for s in (layer.sigma_min, layer.sigma_max)]
        rows.append(
            (
                "\n".join(_selectors(group, [t for t in targets if t.tower == group[0].tower], towers)),
                f"{len(group):,}",
                method,
                f"{rank}" if rank else "-",
                f"{alpha:g}" if alpha else "-",
                f"{sum(sizes[t.path] for t in group):,}",
                f"{rate:g}",
                _span(shares, "{:.2g}"),
                _span([100 * layer.energy for layer in layers], "{:.2g}", " %"),
                what_trains(method, protect),
            )
        )
    return rows


def _selectors(group: Sequence[Target], tower: Sequence[Target], towers: Towers) -> list[str]:
    """Return the tower if `group` holds all of its targets, else a selector for each kind of layer in it.

    The kinds are attention and MLP where all their layers belong to the group, and names of layers elsewhere.
    """
    name = group[0].tower or ""
    if len(group) == len(tower):
        return [name]
    found = []
    for family in ("attention", "mlp", None):
        here, every = ([t.path for t in some if towers.family_of(t.path) == family] for some in (group, tower))
        leaves, all_leaves = ({path.rpartition(".")[2] for path in paths} for paths in (here, every))
        blocks, all_blocks = ({towers.block_of(path) or 0 for path in paths} for paths in (here, every))
        layers = "" if blocks == all_blocks else f"layers[{_span_of_blocks(blocks)}]"
        kinds = [family] if family and here and leaves == all_leaves else sorted(leaves)
        found += [".".join(filter(None, (name, layers, kind))) for kind in kinds]
    return found


def _span_of_blocks(blocks: Collection[int]) -> str:
    """Return the numbers of blocks as text.

    >>> _span_of_blocks({3, 4, 5}), _span_of_blocks({3}), _span_of_blocks({3, 5})
    ('3-5', '3', '3, 5')
    """
    ends = dict.fromkeys((min(blocks, default=0), max(blocks, default=0)))
    is_range = len(blocks) == max(ends) - min(ends) + 1
    return "-".join(map(str, ends)) if is_range else ", ".join(map(str, sorted(blocks)))


def protected_directions(targets: Sequence[Target], protection: Mapping[str, Protection]) -> dict[str, float]:
    """Return the mean share of protected input directions over the layers of each tower."""
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
    """Return the towers of the model in which no target trains."""
    towers, trained = find_towers(base), {target.tower for target in targets}
    present = {"language": towers.language, "projector": towers.projector, "vision": towers.vision}
    return [tower for tower in TOWERS if present[tower] is not None and tower not in trained]


def trained_sizes(targets: Sequence[Target], base: nn.Module) -> dict[str, int]:
    """Return the number of trained parameters of each target by path: those of its adapter, else all.

    A tied head counts 0: it shares the weight of the embeddings.
    """
    from transformers.trainer_pt_utils import get_model_param_count

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


def trainable_line(model: nn.Module) -> str:
    """Return PEFT's line about trained parameters, word for word, because users grep it."""
    from transformers.trainer_pt_utils import get_model_param_count

    return trainable_text(get_model_param_count(model, trainable_only=True), get_model_param_count(model))


def trainable_text(trained: int, total: int) -> str:
    """Return the same line from the counts.

    >>> trainable_text(1, 8)
    'trainable params: 1 || all params: 8 || trainable%: 12.5000'
    """
    return f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}"


def _kind(target: Target) -> tuple[str, str, int, float, float, float]:
    numbers = (target.rank or 0, target.alpha or 0.0, target.learning_rate or 0.0)
    return (target.tower or "", target.method, *numbers, target.protect)


def _span(values: Sequence[float], form: str, unit: str = "") -> str:
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return (low if low == high else f"{low} - {high}") + unit
