"""A dry run and a training import few of our modules: what a run does not need stays out of its way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import modules


@pytest.mark.parametrize(("kind", "most"), [("dry_run", 100), ("train", 125)])
def test_a_run_imports_few_modules(kind: str, most: int) -> None:
    found = modules.imported(kind)
    assert len(found) <= most, "\n".join(found)
