"""Summarize the finished cells: the best learning rate of each method, its test score over seeds, paired tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_eval.stats import PairedDifference, paired_difference
from milora_vl.sweep.cells import Cell, CellNumbers

# The test items of a cell: key of the question -> score, group (usually the picture: not independent), benchmark.
Answers = Callable[[Cell], Mapping[str, tuple[float, Any, str]]]
# Student's t for a two-sided 95 % interval, by degrees of freedom from 1 on.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True)
class SeedMean:
    """A mean over seeds with half the width of its 95 % interval (Student's t); None for a single seed."""

    value: float
    half: float | None
    n: int

    @property
    def text(self) -> str:
        is_tiny = (self.half or 0) < abs(self.value) < 5e-4  # but significantly different from zero
        numbers = [self.value] if self.half is None else [self.value, self.half]
        return " ± ".join(f"{x:.1e}" if is_tiny else f"{round(x, 3) + 0.0:.3f}" for x in numbers)


@dataclass(frozen=True, slots=True)
class Point:
    method: str
    rank: int | None
    learning_rate: float
    validation: SeedMean
    score: SeedMean
    forgetting: SeedMean
    seeds: tuple[int, ...]

    def cell(self, seed: int) -> Cell:
        return Cell(self.method, self.learning_rate, self.rank, seed)


@dataclass(frozen=True, slots=True)
class Arm:
    """A method at one rank: its points by learning rate, and the best one by validation loss (None: none complete)."""

    label: str
    points: tuple[Point, ...]
    best: Point | None
    at_edge: bool


@dataclass(frozen=True, slots=True)
class ArmDifference:
    a: str
    b: str
    difference: PairedDifference
    seeds: int


def mean_of(values: Sequence[float]) -> SeedMean:
    """Return the mean and half its 95 % interval.

    >>> mean_of([1.0, 2.0, 3.0]).text
    '2.000 ± 2.484'
    """
    n = len(values)
    centre = math.fsum(values) / n
    if n < 2:
        return SeedMean(centre, None, n)
    spread = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1))
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.95996 + 2.3723 / (n - 1) + 2.8225 / (n - 1) ** 2
    return SeedMean(centre, t * spread / math.sqrt(n), n)


def arms(results: Mapping[Cell, CellNumbers], seeds: int) -> list[Arm]:
    grouped: dict[str, dict[float, list[Cell]]] = {}
    for cell in results:
        grouped.setdefault(cell.label, {}).setdefault(cell.learning_rate, []).append(cell)
    found = []
    for label, by_rate in grouped.items():
        points = tuple(_point(by_rate[rate], results) for rate in sorted(by_rate))
        complete = [p for p in points if len(p.seeds) == seeds and math.isfinite(p.validation.value)]
        best = min(complete, key=lambda point: point.validation.value, default=None)
        at_edge = best is not None and len(points) > 1 and best in (points[0], points[-1])
        found.append(Arm(label, points, best, at_edge=at_edge))
    return found


def _point(cells: Sequence[Cell], results: Mapping[Cell, CellNumbers]) -> Point:
    """Return the means of the cells, which differ in their seed alone."""
    validation, score, forgetting = (
        mean_of([float(results[cell][key]) for cell in cells]) for key in ("validation_loss", "score", "forgetting")
    )
    method, rank, rate = cells[0].method, cells[0].rank, cells[0].learning_rate
    return Point(method, rank, rate, validation, score, forgetting, tuple(sorted(cell.seed for cell in cells)))


def pairs(all_arms: Sequence[Arm], answers: Answers) -> list[ArmDifference]:
    known = [(arm.label, arm.best) for arm in all_arms if arm.best is not None]
    found = []
    for label, best in known[1:]:
        first, of_first = known[0]
        common = sorted(set(of_first.seeds) & set(best.seeds))
        a, b = (_mean_answers(answers, point, common) for point in (of_first, best))
        ids = sorted(item for item in a if item in b)
        if ids:
            values, groups, benchmarks = zip(*(a[item] for item in ids), strict=True)
            difference = paired_difference(values, [b[item][0] for item in ids], benchmarks, groups)
            found.append(ArmDifference(first, label, difference, len(common)))
    return found


def _mean_answers(answers: Answers, point: Point, seeds: Sequence[int]) -> dict[str, tuple[float, Any, str]]:
    sums: dict[str, list[float]] = {}
    about: dict[str, tuple[Any, str]] = {}
    for seed in seeds:
        for item, (score, *more) in answers(point.cell(seed)).items():
            sums.setdefault(item, []).append(score)
            about[item] = (more[0], more[1])
    return {item: (sum(v) / len(v), *about[item]) for item, v in sums.items() if len(v) == len(seeds)}
