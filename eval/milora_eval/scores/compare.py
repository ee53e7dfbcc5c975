"""Compare two evaluations of the same items: paired differences, standard errors, intervals and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from milora_eval.answers.store import Line, to_answer
from milora_eval.benchmark import Answer, Benchmark, Metric
from milora_eval.stats import Difference, paired_difference, resampled_difference, too_few
from milora_eval.suites import stored_benchmark
from milora_vl.common.errors import UserError
from milora_vl.common.evaluator import Gain, Over

WORK = 1_000_000  # largest number of answers that a bootstrap scores
MIN_RESAMPLES = 100


@dataclass(frozen=True, slots=True)
class Pair:
    """One metric on both sides, over their common items. `difference` is b minus a; None if it cannot be paired."""

    benchmark: str
    a: Metric
    b: Metric
    difference: Difference | None


def compare(a: Sequence[Line], b: Sequence[Line]) -> list[Pair]:
    """Return every metric that both sides have, computed over their common items.

    Raises UserError if there are no common items.
    """
    pairs: list[Pair] = []
    for name in dict.fromkeys(line["benchmark"] for line in a):
        left, right = _common(name, a, b)
        if left:
            pairs += _pairs(name, left, right)
    if not pairs:
        raise UserError(
            "the two evaluations have no item in common",
            code="eval-nothing-in-common",
            hint="both must come from the same benchmark and data",
        )
    return pairs


def headline(a: Sequence[Line], b: Sequence[Line]) -> Pair | None:
    """Return the first metric of two sides with the answers to one benchmark; None if it has no score yet."""
    name = a[0]["benchmark"]
    return next(iter(_pairs(name, *_common(name, a, b), count=1)), None)


def gain(base: Sequence[Line], tuned: Sequence[Line]) -> Gain | None:
    """Return how much better the tuned model is than the base and than the most frequent answer.

    The lines answer one benchmark. None if its headline is not a mean over items.
    """
    name = tuned[0]["benchmark"]
    benchmark = stored_benchmark(name)
    left, right = _common(name, base, tuned)
    metric = next(iter(benchmark.summarise(right)), None)
    if metric is None or metric.mean_of is None:
        return None
    over: Over = "base"
    before = next(metric for metric in benchmark.summarise(left))
    if metric.baseline is not None and metric.baseline > before.value:
        over, left = "majority", [replace(answer, value=answer.item.baseline) for answer in right]
    difference = _difference(metric, benchmark.units(left), benchmark.units(right))
    return None if difference is None else Gain(over, difference.value, difference.low, difference.high)


def num_common(a: Sequence[Line], b: Sequence[Line]) -> int:
    """Return the number of common items."""
    return len({(line["benchmark"], line["id"]) for line in a} & {(line["benchmark"], line["id"]) for line in b})


def _common(name: str, a: Sequence[Line], b: Sequence[Line]) -> tuple[list[Answer], list[Answer]]:
    benchmark = stored_benchmark(name)
    others = {line["id"]: line for line in b if line["benchmark"] == name}
    lines = [line for line in a if line["benchmark"] == name and line["id"] in others]
    return [to_answer(benchmark, line, line.get("judgement")) for line in lines], [
        to_answer(benchmark, others[line["id"]], others[line["id"]].get("judgement")) for line in lines
    ]


def _pairs(name: str, a: Sequence[Answer], b: Sequence[Answer], count: int | None = None) -> list[Pair]:
    """Return the first `count` metrics that both sides have (default: all)."""
    benchmark = stored_benchmark(name)
    right = {metric.name: metric for metric in benchmark.summarise(b)}
    pairs = [(metric, right[metric.name]) for metric in benchmark.summarise(a) if metric.name in right][:count]
    resampled = _resampled(benchmark, pairs, a, b)
    units = benchmark.units(a), benchmark.units(b)
    return [
        Pair(benchmark.name, left, other, resampled.get(left.name) or _difference(left, *units))
        for left, other in pairs
    ]


def _difference(metric: Metric, a: Sequence[Answer], b: Sequence[Answer]) -> Difference | None:
    if metric.mean_of is None:
        return None
    places = [place for place in range(len(a)) if a[place].value is not None and b[place].value is not None]
    if metric.mean_of == "items":
        places = [place for place in places if a[place].item.kind == metric.name] or places
    return paired_difference(
        [a[place].worth for place in places],
        [b[place].worth for place in places],
        [a[place].item.kind if metric.mean_of == "types" else "" for place in places],
        [a[place].item.group for place in places],
    )


def _copy(answer: Answer, times: int) -> Answer:
    """Return the answer with a new group, for a picture that is drawn again."""
    if not times:
        return answer
    return replace(answer, item=replace(answer.item, group=f"{answer.item.group} again {times}"))


def _resampled(
    benchmark: Benchmark, pairs: Sequence[tuple[Metric, Metric]], a: Sequence[Answer], b: Sequence[Answer]
) -> dict[str, Difference]:
    """Return the bootstrapped difference of the headline if it is not a mean over items; else an empty dict.

    Each draw computes all numbers of the benchmark again, so more answers mean fewer draws.
    """
    resamples = min(1000, WORK // max(len(a), 1))
    if not pairs or pairs[0][0].mean_of is not None or not benchmark.can_resample or resamples < MIN_RESAMPLES:
        return {}

    def compute(drawn: list[tuple[int, int]]) -> float | None:
        sides = [benchmark.summarise([_copy(side[place], times) for place, times in drawn]) for side in (a, b)]
        left, right = ({metric.name: metric.value for metric in side} for side in sides)
        return right[name] - left[name] if name in left and name in right else None

    groups = [answer.item.group for answer in a]
    if len(set(groups)) < 2:
        return {}
    name = pairs[0][0].name
    stderr, low, high, p_value = resampled_difference(compute, groups, resamples)
    (left, right), only = pairs[0], [x.worth - y.worth for x, y in zip(a, b, strict=True)]
    note = too_few(only, groups)
    return {
        left.name: Difference(
            value=right.value - left.value,
            stderr=stderr,
            low=None if note else low,
            high=None if note else high,
            only_a=sum(gap > 0 for gap in only),
            only_b=sum(gap < 0 for gap in only),
            p_value=None,
            n=len(a),
            p_bootstrap=None if note else p_value,
            note=note,
        )
    }
