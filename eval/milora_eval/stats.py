"""Formulas of standard errors, confidence intervals, bootstrap and paired tests, clustered by picture.

`mean_stderr` and `clustered_stderr` agree with lmms-eval (lmms_eval/api/metrics.py): ddof 1, and clustering adds the
cross terms within a cluster.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from milora_vl.common.cli.console import amount

# A bootstrap interval needs MIN_GROUPS independent items, and MIN_UNLIKE items whose difference is not the most common
# one: resamples of equal values are equal, so their interval is a point. With both conditions fewer than 9 % of the
# intervals miss the true difference of right and wrong answers; without them it can be more than half.
MIN_GROUPS = 30
MIN_UNLIKE = 5


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def mean_stderr(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean (sample standard deviation, ddof 1, over sqrt(n)); None below two values.

    >>> round(mean_stderr([1, 1, 0, 0]), 6)
    0.288675
    """
    n = len(values)
    if n < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1) / n)


def clustered_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Return the standard error of the mean if the values within a cluster (one picture) are correlated.

    >>> round(clustered_stderr([1, 1, 0, 0], ["a", "a", "b", "b"]), 6)
    0.381881
    """
    return stratified_stderr(values, ["all"] * len(values), clusters)


def stratified_mean(values: Sequence[float], strata: Sequence[Hashable]) -> float:
    return mean([mean(part) for part in _parts(values, strata).values()])


def stratified_stderr(
    values: Sequence[float], strata: Sequence[Hashable], clusters: Sequence[Hashable]
) -> float | None:
    """Return the clustered standard error of `stratified_mean`; None if a stratum has a single value.

    With w_i = 1 / (T n_t) and residuals r_i within the stratum, the variance is the naive one, sum_t s_t^2 / (n_t T^2),
    plus the cross terms w_i r_i w_j r_j of all ordered pairs i != j within a cluster (also across strata).
    """
    parts = _parts(values, strata)
    if not parts or any(len(part) < 2 for part in parts.values()):
        return None
    centre = {name: mean(part) for name, part in parts.items()}
    naive = math.fsum((mean_stderr(part) or 0.0) ** 2 for part in parts.values()) / len(parts) ** 2
    numbers = _numbered(clusters)
    sums, squares = np.zeros(int(np.max(numbers)) + 1), np.zeros(int(np.max(numbers)) + 1)
    pairs = zip(values, strata, strict=True)
    terms = np.array([(value - centre[name]) / (len(parts) * len(parts[name])) for value, name in pairs])
    np.add.at(sums, numbers, terms)
    np.add.at(squares, numbers, terms**2)
    crossed = math.fsum(each**2 - square for each, square in zip(sums.flat, squares.flat, strict=True))
    return math.sqrt(max(naive + crossed, 0.0))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A paired difference B minus A on the same items.

    The 95 % interval (`low`, `high`) and `p_bootstrap` resample whole clusters. `p_value` is McNemar's test over the
    items that one side scores higher; None if the number is not a mean over items. With too few items for an interval
    or a p-value, these are None and `note` says why.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    only_a: int
    only_b: int
    p_value: float | None
    n: int
    p_bootstrap: float | None = None
    note: str = ""


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = 1000,
) -> PairedDifference:
    """Compare two runs on identical items: difference of (stratified) means, clustered error, interval, McNemar's test.

    Raises ValueError if the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired comparison needs the same items on both sides, got {len(a)} and {len(b)}")
    gaps = [right - left for left, right in zip(a, b, strict=True)]
    strata = strata if strata is not None else ["all"] * len(gaps)
    clusters = clusters if clusters is not None else list(range(len(gaps)))
    note, low, high, p_bootstrap = too_few(gaps, clusters), None, None, None
    if not note:
        draws = _bootstrap(gaps, strata, clusters, resamples)
        (low, high), p_bootstrap = interval(draws), bootstrap_p(draws)
    only_a, only_b = sum(gap < 0 for gap in gaps), sum(gap > 0 for gap in gaps)
    return PairedDifference(
        value=stratified_mean(gaps, strata),
        stderr=stratified_stderr(gaps, strata, clusters),
        low=low,
        high=high,
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b) if len(set(clusters)) >= MIN_GROUPS else None,
        n=len(gaps),
        p_bootstrap=p_bootstrap,
        note=note,
    )


def too_few(gaps: Sequence[float], clusters: Sequence[Hashable]) -> str:
    """Return why these differences allow no interval; empty if they do.

    >>> too_few([1.0, 0.0], ["a", "b"])
    'no interval and no p-value from 2 items, 30 are needed'
    """
    sums: dict[Hashable, float] = defaultdict(float)
    for gap, cluster in zip(gaps, clusters, strict=True):
        sums[cluster] += gap
    if len(sums) < MIN_GROUPS:
        about = "" if len(sums) == len(gaps) else " (all questions about one picture count as one item)"
        return f"no interval and no p-value from {amount(len(sums), 'item')}{about}, {MIN_GROUPS} are needed"
    alike = max(Counter(round(total, 9) for total in sums.values()).values())
    if (unlike := len(sums) - alike) < MIN_UNLIKE:
        return f"no interval: only {amount(unlike, 'item')} differ from the most common value, {MIN_UNLIKE} are needed"
    return ""


def resampled_difference(
    compute: Callable[[list[tuple[int, int]]], float | None], groups: Sequence[Hashable], resamples: int
) -> tuple[float, float, float, float]:
    """Return standard error, interval (low, high) and p-value of a number that is not a mean, such as an F1.

    Whole groups (pictures) are drawn with replacement. `compute` takes a list of (item index, how often its group was
    drawn before) and returns the difference, or None if it is undefined for these items.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    parts, generator = list(members.values()), np.random.default_rng(0)
    draws: list[float] = []
    for _ in range(resamples):
        chosen = generator.integers(len(parts), size=len(parts))
        seen: Counter[int] = Counter()
        drawn = []
        for number in chosen.tolist():
            drawn += [(index, seen[number]) for index in parts[number]]
            seen[number] += 1
        difference = compute(drawn)
        draws += [] if difference is None else [difference]
    low, high = interval(draws)
    return float(np.std(draws, ddof=1)), low, high, bootstrap_p(draws)


def interval(draws: Sequence[float]) -> tuple[float, float]:
    if not len(draws):
        return math.nan, math.nan
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_p(draws: Sequence[float]) -> float:
    """Return the two-sided p-value of "no difference": twice the share of resampled differences on zero's far side.

    >>> bootstrap_p([0.1, 0.2, 0.3])
    0.5
    """
    beyond = min(sum(draw <= 0 for draw in draws), sum(draw >= 0 for draw in draws))
    return min(1.0, 2 * (beyond + 1) / (len(draws) + 1))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test over the items that only one of two models answers right.

    >>> round(mcnemar(0, 5), 9)
    0.0625
    """
    n, k = only_a + only_b, min(only_a, only_b)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _parts(values: Sequence[float], strata: Sequence[Hashable]) -> dict[Hashable, list[float]]:
    parts: dict[Hashable, list[float]] = {}
    for value, stratum in zip(values, strata, strict=True):
        parts.setdefault(stratum, []).append(value)
    return parts


def _bootstrap(
    values: Sequence[float], strata: Sequence[Hashable], clusters: Sequence[Hashable], resamples: int
) -> list[float]:
    """Return stratified means of resamples; each draws whole clusters with replacement."""
    if not values:
        return []
    rows, columns = _numbered(clusters), _numbered(strata)
    shape = (int(np.max(rows)) + 1, int(np.max(columns)) + 1)
    totals, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(totals, (rows, columns), np.asarray(values, dtype=float))
    np.add.at(counts, (rows, columns), 1.0)
    generator, draws = np.random.default_rng(0), []
    for _ in range(resamples):
        times = np.bincount(generator.integers(shape[0], size=shape[0]), minlength=shape[0])
        drawn = times @ counts
        draws.append(float(np.mean((times @ totals)[drawn > 0] / drawn[drawn > 0])))
    return draws


def _numbered(names: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int64, len(names))
