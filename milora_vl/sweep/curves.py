"""Forgetting at equal validation loss: each method is a curve over its learning rates, read where a reference ends.

A comparison at "the best learning rate of each method" is unfair: the loss is flat near its minimum while forgetting
grows with the rate, so the choice among nearly equal rates decides how much a method forgets. Here every seed of a
method gives a curve of forgetting over validation loss. A curve and the reference's are read at the lowest loss
that both reach with the same seed, so the ratios are paired by seed. Vision-language tasks are read twice: for text and
for pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from milora_vl.common.cli.table import Table
from milora_vl.sweep.cells import PICTURES, Cell, CellNumbers
from milora_vl.sweep.results import mean_of


@dataclass(frozen=True, slots=True)
class Spot:
    """The end of one training: its validation loss (nats per token), and how much it forgot."""

    loss: float
    forgetting: float


# label -> seed -> the front of its trainings
Curves = Mapping[str, Mapping[int, Sequence[Spot]]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A geometric mean over seeds with its 95 % interval (Student's t on the logarithms); one seed has no interval.

    `is_lower_bound`: in some seed the loss is above the curve of the reference, whose last training is used instead. A
    training of the reference at a lower rate might forget less there, and the true ratio is at least this one.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    is_lower_bound: bool = False

    @property
    def text(self) -> str:
        """
        >>> Ratio(0.1, 0.05, 0.2, 3).text
        '0.10 (0.050 to 0.20)'
        """
        numbers = [_two_digits(x) for x in (self.value, self.low, self.high) if x is not None]
        interval = "" if len(numbers) == 1 else f" ({numbers[1]} to {numbers[2]})"
        return f"{'≥ ' if self.is_lower_bound else ''}{numbers[0]}{interval}"


def about_pictures(results: Mapping[Cell, CellNumbers]) -> dict[Cell, CellNumbers]:
    """Return the results with what was forgotten about pictures as `forgetting`; empty if no cell measures it."""
    return {
        cell: {**result, "forgetting": result[PICTURES]}
        for cell, result in results.items()
        if result.get(PICTURES) not in (None, "")
    }


def curve(spots: Sequence[Spot]) -> list[Spot]:
    """Return the front of the trainings of one seed: the lowest loss first, each further one with less forgetting.

    A training that another one beats in both numbers is not on it (a rate that is too high, for example), and neither
    is one with NaN.
    """
    front: list[Spot] = []
    finite = [spot for spot in spots if math.isfinite(spot.loss) and math.isfinite(spot.forgetting)]
    for spot in sorted(finite, key=lambda spot: (spot.loss, spot.forgetting)):
        if not front or spot.forgetting < front[-1].forgetting:
            front.append(spot)
    return front


def forgetting_at(front: Sequence[Spot], loss: float) -> float | None:
    """Return the forgetting with which a curve reaches a loss; None if no training reaches it.

    Between two trainings the logarithm of forgetting is interpolated over the loss. Above the highest loss of the
    curve the value comes from its last training, which reaches a lower loss: an upper bound.

    >>> forgetting_at([Spot(0.8, 1.0), Spot(0.9, 0.01)], 0.85)
    0.1
    """
    if not front or loss < front[0].loss:
        return None
    for better, worse in pairwise(front):
        if loss < worse.loss:
            share = (loss - better.loss) / (worse.loss - better.loss)
            if worse.forgetting <= 0:  # a logarithm needs positive numbers
                return better.forgetting + share * (worse.forgetting - better.forgetting)
            return round(math.exp(math.log(better.forgetting) * (1 - share) + math.log(worse.forgetting) * share), 12)
    return front[-1].forgetting


def curves_of(results: Mapping[Cell, CellNumbers]) -> Curves:
    spots: dict[str, dict[int, list[Spot]]] = {}
    for cell, result in results.items():
        spot = Spot(float(result["validation_loss"]), float(result["forgetting"]))
        spots.setdefault(cell.label, {}).setdefault(cell.seed, []).append(spot)
    return {
        label: {seed: front for seed, of_seed in by_seed.items() if (front := curve(of_seed))}
        for label, by_seed in spots.items()
    }


def at_common_loss(fronts: Mapping[int, Sequence[Spot]], of_reference: Mapping[int, Sequence[Spot]]) -> Ratio | None:
    """Return the ratio to the reference at the lowest loss that both reach, seed by seed; None without such a seed."""
    logs, is_lower_bound = list[float](), False
    for seed, front in fronts.items():
        if seed in of_reference:
            loss = max(front[0].loss, of_reference[seed][0].loss)
            is_lower_bound |= loss > of_reference[seed][-1].loss
            pair = forgetting_at(front, loss), forgetting_at(of_reference[seed], loss)
            if not pair[0] or not pair[1] or min(pair[0], pair[1]) <= 0:  # something forgot nothing at all
                return None
            logs.append(math.log(pair[0] / pair[1]))
    if not logs:
        return None
    mean = mean_of(logs)
    half = mean.half
    low, high = (None, None) if half is None else (math.exp(mean.value - half), math.exp(mean.value + half))
    return Ratio(math.exp(mean.value), low, high, mean.n, is_lower_bound)


def ratios_to(reference: str, results: Mapping[Cell, CellNumbers]) -> dict[str, dict[str, Ratio | None]]:
    """Return the ratio of each arm to the reference at equal loss, of `forgetting`, or of `text` and of `pictures`.

    Returns nothing if the reference has no curve.
    """
    pictures = about_pictures(results)
    found = {}
    for kind, of_kind in ({"text": results, "pictures": pictures} if pictures else {"forgetting": results}).items():
        curves = curves_of(of_kind)
        if not curves.get(reference):
            return {}
        found[kind] = {arm: at_common_loss(fronts, curves[reference]) for arm, fronts in curves.items() if fronts}
    return found


def equal_loss_table(
    results: Mapping[Cell, CellNumbers], reference: str, named: Callable[[str], str] = str
) -> Table | None:
    """Return a table of all arms with the ratio of forgetting to the reference at equal loss.

    `named` returns the name to show of an arm. Returns None if the reference has no curve.
    """
    columns = {
        f"{kind}, equal loss": {arm: ratio.text for arm, ratio in ratios.items() if ratio} | {reference: "1"}
        for kind, ratios in ratios_to(reference, results).items()
    }
    if not columns:
        return None
    by_loss = {arm: fronts for arm, fronts in curves_of(results).items() if fronts}
    lowest = by_loss[reference]
    rows = []
    for arm, fronts in by_loss.items():
        of_arm = [(cell.seed, float(row["score"])) for cell, row in results.items() if cell.label == arm]
        scores = [max(score for of_seed, score in of_arm if of_seed == seed) for seed in fronts]
        reached = sum(front[0].loss <= lowest[seed][0].loss for seed, front in fronts.items() if seed in lowest)
        rows.append((
            named(arm), mean_of([front[0].loss for front in fronts.values()]).text, mean_of(scores).text,
            *(column.get(arm, "–") for column in columns.values()), f"{reached} of {len(fronts)}",
        ))  # fmt: skip
    caption = (
        f"Forgetting relative to {named(reference)}, at the lowest validation loss that both reach with the same seed: "
        f"geometric means with 95 % intervals over seeds. ≥: a lower bound, as {named(reference)} might forget less "
        f"there at a lower rate. Last column: the seeds that reach the lowest loss of {named(reference)}."
    )
    return Table(("arm", "lowest loss", "best score", *columns, "reached"), tuple(rows), caption)


def _two_digits(x: float) -> str:
    if not 0 < x < math.inf:
        return f"{x:g}"
    return f"{x:.{max(0, 1 - math.floor(math.log10(x)))}f}"
