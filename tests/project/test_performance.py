"""docs/performance.md shows benchmarks/results.json from one machine, with a reason for every missed goal."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def everything() -> Any:
    """Return benchmarks/all.py as a module."""
    spec = importlib.util.spec_from_file_location("all_benchmarks", ROOT / "benchmarks" / "all.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_results() -> None:
    """`python benchmarks/all.py --page` writes it again."""
    from performance import page

    assert page(RESULTS, everything().SETS) == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_every_part_has_a_result_and_a_script() -> None:
    """The results are exactly the parts of `make bench-full`."""
    parts = everything().PARTS
    assert set(parts) == set(RESULTS)
    for name, command in parts.items():
        assert RESULTS[name]["command"] == f"python benchmarks/{command}"
        assert (ROOT / "benchmarks" / command.split()[0]).is_file()


def test_a_result_keeps_the_last_one_of_another_day_and_the_page_shows_where_they_differ() -> None:
    from goals import Goal
    from performance import other_day

    earlier, goal = everything().earlier, Goal("what", "", "part", lambda result: float(result), 1, " s")
    first = {"date": "2026-11-26", "machine": {}, "result": 10.0, "seconds": 1.0}
    assert earlier(None, "2026-11-26") == {}
    assert earlier(first, "2026-11-26") == {}
    second = {"date": "2026-11-27", "machine": {}, "result": 10.9} | earlier(first, "2026-11-27")
    assert other_day(goal, second) == ""
    third = {"date": "2026-11-27", "machine": {}, "result": 12.0} | earlier(second, "2026-11-27")
    assert other_day(goal, third) == "10 s, 2026-11-26"
    assert other_day(goal, first) == ""


def test_every_goal_that_is_missed_has_its_reason() -> None:
    from goals import GOALS, REASONS

    missed = [goal.what for goal in GOALS if not goal.is_met(goal.value(RESULTS[goal.part]["result"]))]
    assert [what for what in missed if what not in REASONS] == []
    assert set(REASONS) <= {goal.what for goal in GOALS}
