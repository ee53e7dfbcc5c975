"""Two evaluations of the same items: paired differences with standard error, interval and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milora_data.errors import UserError
from milora_eval.benchmark import Answer, Metric
from milora_eval.lines import to_answer
from milora_eval.stats import Difference, paired_difference
from milora_eval.store import Line
from milora_eval.suites import find_benchmark


@dataclass(frozen=True, slots=True)
class Pair:
    """One metric on both sides, over the items that both have. `difference` is b minus a; None where not a mean."""

    benchmark: str
    a: Metric
    b: Metric
    difference: Difference | None


def compare(a: Sequence[Line], b: Sequence[Line]) -> list[Pair]:
    """Return every metric that both sides have, computed over their common items.

    Raises UserError when there are none.
    """
    pairs: list[Pair] = []
    for name in dict.fromkeys(line["benchmark"] for line in a):
        left, right = _common(name, a, b)
        if left:
            pairs += _pairs(name, left, right)
    if not pairs:
        raise UserError("the two evaluations have no item in common\nboth must come from the same benchmark and data")
    return pairs


def num_common(a: Sequence[Line], b: Sequence[Line]) -> int:
    """Return how many items both sides have."""
    return len({(line["benchmark"], line["id"]) for line in a} & {(line["benchmark"], line["id"]) for line in b})


def _common(name: str, a: Sequence[Line], b: Sequence[Line]) -> tuple[list[Answer], list[Answer]]:
    benchmark = find_benchmark(name)
    others = {line["id"]: line for line in b if line["benchmark"] == name}
    lines = [line for line in a if line["benchmark"] == name and line["id"] in others]
    return [to_answer(benchmark, line) for line in lines], [to_answer(benchmark, others[line["id"]]) for line in lines]


def _pairs(name: str, a: Sequence[Answer], b: Sequence[Answer]) -> list[Pair]:
    benchmark = find_benchmark(name)
    right = {metric.name: metric for metric in benchmark.summarise(b)}
    return [
        Pair(name, metric, right[metric.name], _difference(metric, a, b))
        for metric in benchmark.summarise(a)
        if metric.name in right
    ]


def _difference(metric: Metric, a: Sequence[Answer], b: Sequence[Answer]) -> Difference | None:
    if metric.mean_of is None:
        return None
    places = list(range(len(a)))
    if metric.mean_of == "items":
        places = [place for place in places if a[place].item.kind == metric.name] or places
    return paired_difference(
        [a[place].value for place in places],
        [b[place].value for place in places],
        [a[place].item.kind if metric.mean_of == "types" else "" for place in places],
        [a[place].item.group for place in places],
    )
