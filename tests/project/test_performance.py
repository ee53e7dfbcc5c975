"""docs/performance.md shows benchmarks/results.json from one machine, with a reason for every missed goal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_page_is_made_of_the_results() -> None:
    """`python benchmarks/all.py --page` writes it again."""
    from performance import page

    assert page(RESULTS) == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_every_part_has_a_result_and_a_script() -> None:
    """The results are exactly the parts of `make bench`."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("all_benchmarks", ROOT / "benchmarks" / "all.py")
    assert spec
    assert spec.loader
    everything = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(everything)
    assert set(everything.PARTS) == set(RESULTS)
    for name, command in everything.PARTS.items():
        assert RESULTS[name]["command"] == f"python benchmarks/{command}"
        assert (ROOT / "benchmarks" / command.split()[0]).is_file()


def test_every_goal_that_is_missed_has_its_reason() -> None:
    from goals import GOALS, REASONS

    missed = [goal.what for goal in GOALS if not goal.is_met(goal.value(RESULTS[goal.part]["result"]))]
    assert [what for what in missed if what not in REASONS] == []
    assert set(REASONS) <= {goal.what for goal in GOALS}
