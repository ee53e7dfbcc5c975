"""Comparing two evaluations: paired by id, over their common items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milora_eval.answers.store import to_line
from milora_eval.benchmarks.emoji import Emoji
from milora_eval.scores.compare import compare, num_common
from milora_vl.common.cli.table import Table, show
from support.eval_questions import write_questions
from support.problems import raises_code


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "emoji")


def answered(data: Path, right: set[str]) -> list[dict[str, Any]]:
    """Return an answer to every item, right if its id is in `right`."""
    benchmark = Emoji()
    return [
        to_line(benchmark, item, item.answers[0] if item.id in right else "nonsense", item.id, data)
        for item in benchmark.load(data)
    ]


def test_differences_are_paired_by_id_whatever_the_order(data: Path) -> None:
    a = answered(data, {"colour-red", "colour-green"})
    b = answered(data, {"colour-red", "colour-blue", "colour-white", "yes_no-red"})
    pairs = {pair.b.name: pair for pair in compare(a, b[::-1])}
    colour = pairs["colour"].difference
    assert colour is not None
    assert (colour.value, colour.only_a, colour.only_b, colour.n) == (0.25, 1, 2, 4)
    assert pairs["colour"].a.value == 0.5
    overall = pairs["mean over types"].difference
    assert overall is not None
    assert overall.value == pytest.approx(pairs["mean over types"].b.value - pairs["mean over types"].a.value)
    assert overall.n == 22


def test_only_common_items_are_compared(data: Path) -> None:
    a, b = answered(data, set()), answered(data, {"colour-red"})
    assert num_common(a, b[:10]) == 10
    assert sum(pair.b.n for pair in compare(a, b[:10])[1:-1]) == 10


def test_nothing_in_common_is_an_error(data: Path) -> None:
    lines = answered(data, set())
    with raises_code("eval-nothing-in-common", message="no item in common"):
        compare(lines[:3], lines[5:])


def test_names_with_brackets_and_colons_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show(Table(("", "n"), (("[bold]kind", "1"),), "see [red]", "A runs/[/x], B :smile:"), "human")
    said = " ".join(capsys.readouterr().out.split())
    assert all(word in said for word in ("runs/[/x], B :smile:", "[bold]kind", "see [red]"))
