"""Forgetting at equal validation loss: each method is a curve over its learning rates, read where a reference ends.

A comparison at "the best learning rate of each method" is unfair: the loss is flat near its minimum while forgetting
grows with the rate, so the choice among nearly equal rates decides how much a method forgets. Here every seed of a
method gives a curve of forgetting over validation loss. Each is read at the lowest loss that it and the reference reach
with that seed, and the ratios are paired by seed. Vision-language tasks are read twice: for text and
for pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from milora_vl.common.cli.table import Table
from milora_vl.sweep.cells import Cell, CellNumbers
from milora_vl.sweep.results import Mean, mean_of

PICTURES = "forgetting_pictures"  # the second number of vision-language tasks


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
        """The ratio and its interval as text.

        >>> Ratio(0.1, 0.05, 0.2, 3).text
        '0.10 (0.050 to 0.20)'
        """
        numbers = [_two_digits(x) for x in (self.value, self.low, self.high) if x is not None]
        interval = "" if len(numbers) == 1 else f" ({numbers[1]} to {numbers[2]})"
        return f"{'≥ ' if self.is_lower_bound else ''}{numbers[0]}{interval}"


@dataclass(frozen=True, slots=True)
class Reading:
    """One arm beside the reference: its forgetting at the lowest loss of the reference, over the seeds that reach it.

    `reached` counts these of the `seeds`. `ratio` is that of `at_common_loss`.
    """

    label: str
    lowest_loss: Mean
    forgetting: Mean | None
    ratio: Ratio | None
    reached: int
    seeds: int


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
    """Return the curve of each seed of each arm; a seed without a finite number has none."""
    spots: dict[str, dict[int, list[Spot]]] = {}
    for cell, result in results.items():
        spot = Spot(float(result["validation_loss"]), float(result["forgetting"]))
        spots.setdefault(cell.label, {}).setdefault(cell.seed, []).append(spot)
    return {
        label: {seed: front for seed, of_seed in by_seed.items() if (front := curve(of_seed))}
        for label, by_seed in spots.items()
    }


def read(curves: Curves, reference: str) -> list[Reading]:
    """Read every curve at the losses of the reference, seed by seed; the reference is the first reading.

    Returns an empty list if the reference has no curve.
    """
    of_reference = curves.get(reference)
    if not of_reference:
        return []
    order = [reference, *(label for label in curves if label != reference)]
    return [_reading(label, curves[label], of_reference) for label in order if curves[label]]


def _reading(label: str, fronts: Mapping[int, Sequence[Spot]], of_reference: Mapping[int, Sequence[Spot]]) -> Reading:
    common = [seed for seed in of_reference if seed in fronts]
    at_lowest = [forgetting_at(fronts[seed], of_reference[seed][0].loss) for seed in common]
    reached = [value for value in at_lowest if value is not None]
    return Reading(
        label, mean_of([front[0].loss for front in fronts.values()]), mean_of(reached) if reached else None,
        at_common_loss(fronts, of_reference), len(reached), len(common),
    )  # fmt: skip


def at_common_loss(fronts: Mapping[int, Sequence[Spot]], of_reference: Mapping[int, Sequence[Spot]]) -> Ratio | None:
    """Return the ratio to the reference at the lowest loss that both reach, seed by seed; None without such a seed."""
    pairs, is_lower_bound = [], False
    for seed, front in fronts.items():
        if seed in of_reference:
            loss = max(front[0].loss, of_reference[seed][0].loss)
            is_lower_bound |= loss > of_reference[seed][-1].loss
            pair = forgetting_at(front, loss), forgetting_at(of_reference[seed], loss)
            assert pair[0] is not None
            assert pair[1] is not None
            pairs.append((pair[0], pair[1]))
    ratio = _ratio(pairs)
    return None if ratio is None else replace(ratio, is_lower_bound=is_lower_bound)


def _ratio(pairs: Sequence[tuple[float, float]]) -> Ratio | None:
    """Return the geometric mean of the ratios a / b. None without pairs, or if something forgot nothing at all."""
    if not pairs or any(min(pair) <= 0 for pair in pairs):
        return None
    logs = mean_of([math.log(a / b) for a, b in pairs])
    if logs.half is None:
        return Ratio(math.exp(logs.value), None, None, logs.n)
    return Ratio(math.exp(logs.value), math.exp(logs.value - logs.half), math.exp(logs.value + logs.half), logs.n)


def curves_table(readings: Sequence[Reading], pictures: Sequence[Reading] = ()) -> Table:
    """Return a table with one row per arm: how much it forgets at the loss of the reference, and the ratio to it.

    `pictures` holds the readings of the same arms about pictures, for two more columns.
    """
    of_pictures = {reading.label: reading for reading in pictures}
    rows = [
        (
            reading.label, reading.lowest_loss.text, *_read_cells(reading),
            *(_read_cells(of_pictures.get(reading.label)) if pictures else ()), f"{reading.reached} of {reading.seeds}",
        )
        for reading in readings
    ]  # fmt: skip
    reference = readings[0].label if readings else "the reference"
    caption = (
        f"Forgetting is read at the lowest validation loss that {reference} reaches with the same seed, the ratio at "
        "the lowest loss that both reach: a geometric mean over seeds with its 95 % interval (Student’s t on the "
        "logarithms). ≥: a lower bound, as in some seed the arm ends above the losses that the reference was trained "
        f"to. “Seeds”: how many reach the lowest loss of {reference}."
    )
    header = (
        "arm", "lowest loss", "forgetting at this loss", f"ratio to {reference}",
        *(("about pictures", "ratio about pictures") if pictures else ()), "seeds",
    )  # fmt: skip
    return Table(header, tuple(rows), caption)


def _read_cells(reading: Reading | None) -> tuple[str, str]:
    if reading is None:
        return "–", "–"
    forgetting = reading.forgetting.text if reading.forgetting else "not reached"
    return forgetting, reading.ratio.text if reading.ratio else "–"


def _two_digits(x: float) -> str:
    """Format with two significant digits and without an exponent: 0.013, 0.50, 1.2, 15."""
    if not 0 < x < math.inf:
        return f"{x:g}"
    return f"{x:.{max(0, 1 - math.floor(math.log10(x)))}f}"
