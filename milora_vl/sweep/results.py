"""Summarize the finished cells: the best learning rate of each method, its test score over seeds, paired tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_eval.stats import Difference, paired_difference
from milora_vl.sweep.cells import Cell, CellNumbers

# The test items of a cell: id -> (score, group, usually the picture); items of one group are not independent.
Answers = Callable[[Cell], Mapping[str, tuple[float, Any]]]
# Student's t for a two-sided 95 % interval, by degrees of freedom from 1 on.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds with half the width of its 95 % interval (Student's t); None for a single seed."""

    value: float
    half: float | None
    n: int

    @property
    def text(self) -> str:
        """The mean and half its interval as text."""
        is_tiny = (self.half or 0) < abs(self.value) < 5e-4  # but significantly different from zero
        numbers = [self.value] if self.half is None else [self.value, self.half]
        return " ± ".join(f"{x:.1e}" if is_tiny else f"{round(x, 3) + 0.0:.3f}" for x in numbers)


@dataclass(frozen=True, slots=True)
class Point:
    """One method at one rank and learning rate, over its finished seeds."""

    method: str
    rank: int | None
    learning_rate: float
    validation: Mean
    score: Mean
    forgetting: Mean
    seeds: tuple[int, ...]

    def cell(self, seed: int) -> Cell:
        """Return the cell of one seed."""
        return Cell(self.method, self.learning_rate, self.rank, seed)

    @property
    def label(self) -> str:
        """Method and rank."""
        return self.cell(0).label


@dataclass(frozen=True, slots=True)
class Arm:
    """A method at one rank: its points by learning rate, and the best one by validation loss (None: none complete)."""

    label: str
    points: tuple[Point, ...]
    best: Point | None
    at_edge: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """The paired difference b minus a of two arms at their best learning rates; items are means over common seeds."""

    a: str
    b: str
    difference: Difference
    seeds: int


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean and half its 95 % interval.

    >>> mean_of([1.0, 2.0, 3.0]).text
    '2.000 ± 2.484'
    """
    n = len(values)
    centre = math.fsum(values) / n
    if n < 2:
        return Mean(centre, None, n)
    spread = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1))
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.95996 + 2.3723 / (n - 1) + 2.8225 / (n - 1) ** 2
    return Mean(centre, t * spread / math.sqrt(n), n)


def arms(results: Mapping[Cell, CellNumbers], seeds: int) -> list[Arm]:
    """Group the results by arm. The validation loss selects the best training among those with all seeds."""
    grouped = []
    for method, rank in dict.fromkeys(cell.arm for cell in results):
        by_rate: dict[float, dict[int, CellNumbers]] = {}
        for cell, result in results.items():
            if cell.arm == (method, rank):
                by_rate.setdefault(cell.learning_rate, {})[cell.seed] = result
        points = tuple(_point(method, rank, rate, by_rate[rate]) for rate in sorted(by_rate))
        complete = [p for p in points if len(p.seeds) == seeds and math.isfinite(p.validation.value)]
        best = min(complete, key=lambda point: point.validation.value, default=None)
        rates = [point.learning_rate for point in points]
        at_edge = best is not None and min(rates) < max(rates) and best.learning_rate in (min(rates), max(rates))
        grouped.append(Arm(points[0].label, points, best, at_edge=at_edge))
    return grouped


def pairs(all_arms: Sequence[Arm], answers: Answers) -> list[Pair]:
    """Compare every arm with the first one, on the test items that both answered."""
    ready = [arm for arm in all_arms if arm.best is not None]
    out = []
    for arm in ready[1:]:
        assert arm.best is not None
        assert ready[0].best is not None
        common = sorted(set(ready[0].best.seeds) & set(arm.best.seeds))
        a, b = (_mean_answers(answers, point, common) for point in (ready[0].best, arm.best))
        ids = [item for item in a if item in b]
        if ids:
            groups = [a[item][1] for item in ids]
            difference = paired_difference([a[i][0] for i in ids], [b[i][0] for i in ids], clusters=groups)
            out.append(Pair(ready[0].label, arm.label, difference, len(common)))
    return out


def _point(method: str, rank: int | None, rate: float, by_seed: Mapping[int, CellNumbers]) -> Point:
    def over_seeds(key: str) -> Mean:
        return mean_of([float(result[key]) for result in by_seed.values()])

    return Point(
        method, rank, rate, over_seeds("validation_loss"), over_seeds("score"), over_seeds("forgetting"),
        tuple(sorted(by_seed)),
    )  # fmt: skip


def _mean_answers(answers: Answers, point: Point, seeds: Sequence[int]) -> dict[str, tuple[float, Any]]:
    """Return per item its mean score over the seeds, and its group."""
    sums: dict[str, list[float]] = {}
    groups: dict[str, Any] = {}
    for seed in seeds:
        for item, (score, group) in answers(point.cell(seed)).items():
            sums.setdefault(item, []).append(score)
            groups[item] = group
    return {item: (sum(v) / len(v), groups[item]) for item, v in sums.items() if len(v) == len(seeds)}
