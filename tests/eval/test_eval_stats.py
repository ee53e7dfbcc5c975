"""Standard errors against hand-worked values and simulations; paired comparisons against the textbook."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest

from milora_eval.benchmark import Answer, Item
from milora_eval.benchmarks.pope import POPE
from milora_eval.stats import (
    MIN_GROUPS,
    mean_stderr,
    paired_difference,
    resampled_difference,
    stratified_mean,
    stratified_stderr,
)

ROOT = Path(__file__).resolve().parents[2]


def test_the_error_of_a_mean_over_types_is_that_of_repeated_experiments() -> None:
    """All questions about a picture share its difficulty; 300 experiments give the true spread."""

    def experiment(rng: random.Random) -> tuple[list[float], list[str], list[int]]:
        values, types, pictures = [], [], []
        for picture in range(60):
            shared = rng.gauss(0, 0.25)
            for kind, chance in (("a", 0.3), ("a", 0.3), ("b", 0.6)):
                values.append(float(rng.random() < chance + shared))
                types.append(kind)
                pictures.append(picture)
        return values, types, pictures

    rng = random.Random(1)
    runs = [experiment(rng) for _ in range(300)]
    spread = statistics.stdev(stratified_mean(values, types) for values, types, _ in runs)
    told = statistics.mean(stratified_stderr(*run) or 0.0 for run in runs)
    assert told == pytest.approx(spread, rel=0.1)


def test_a_paired_difference_is_sharper_than_two_errors_apart() -> None:
    rng = random.Random(2)
    a = [float(rng.random() < 0.5) for _ in range(500)]
    b = [1.0 if value or rng.random() < 0.1 else 0.0 for value in a]
    found = paired_difference(a, b)
    apart = math.hypot(mean_stderr(a) or 0, mean_stderr(b) or 0)
    assert found.value == pytest.approx(statistics.mean(b) - statistics.mean(a))
    assert found.stderr is not None
    assert found.stderr < apart / 2
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.stderr, rel=0.15)
    assert (found.only_a, found.only_b) == (0, sum(b) - sum(a))


def test_questions_about_one_picture_count_once() -> None:
    rng = random.Random(0)
    a, b = ([float(rng.random() < 0.5) for _ in range(58)] for _ in range(2))
    assert paired_difference(a, b).p_bootstrap is not None
    found = paired_difference(a, b, clusters=[place // 2 for place in range(58)])
    assert (found.low, found.p_value, found.p_bootstrap) == (None,) * 3
    assert "from 29 items" in found.note


@pytest.mark.parametrize(("only_a", "only_b"), [(0.25, 0.25), (0.15, 0.05), (0.02, 0.5), (0.0, 0.9), (0.02, 0.0)])
def test_an_interval_that_misses_the_truth_is_rarely_shown(only_a: float, only_b: float) -> None:
    """Of all comparisons of the fewest questions that are allowed."""
    rng, missed, times = random.Random(0), 0, 200
    for _ in range(times):
        drawn = [rng.random() for _ in range(MIN_GROUPS)]
        a = [float(x < only_a) for x in drawn]
        b = [float(x > 1 - only_b) for x in drawn]
        found = paired_difference(a, b, resamples=300)
        if found.low is not None and found.high is not None:
            missed += not found.low - 1e-9 <= only_b - only_a <= found.high + 1e-9
    assert missed / times <= 0.12  # 0.09, plus the sampling error of 200 draws


@pytest.mark.parametrize(("items", "unlike", "has_interval"), [(30, 5, True), (30, 4, False), (29, 5, False)])
def test_an_interval_needs_thirty_items_of_which_five_differ(items: int, unlike: int, has_interval: bool) -> None:
    found = paired_difference([0.0] * items, [1.0] * unlike + [0.0] * (items - unlike))
    assert (found.low is not None) == (found.high is not None) == has_interval
    assert (found.note == "") == has_interval


def test_the_error_of_an_f1_is_that_of_drawing_pictures_again() -> None:
    rng = random.Random(0)
    answers = []
    for picture in range(80):
        skill = rng.random()  # the questions about a picture are equal
        for name in ("random", "popular"):
            for label in ("yes", "no", "yes"):
                said = label if rng.random() < skill else {"yes": "no", "no": "yes"}[label]
                item = Item("x", (), answers=(label,), kind=name, group=f"p{picture}")
                answers.append(Answer(item, said, float(said == label)))
    headline = POPE().summarise(answers)[0]
    stderr, *_ = resampled_difference(
        lambda drawn: POPE().summarise([answers[place] for place, _ in drawn])[0].value,
        [answer.item.group for answer in answers],
        400,
    )
    assert headline.stderr == pytest.approx(stderr, rel=0.15)
