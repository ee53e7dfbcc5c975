"""The names of the tests, and their order, depend on the code alone: processes that share the tests must agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.thorough import unused

ROOT = Path(__file__).resolve().parents[2]
# Collects with a clock that is `sys.argv[1]` seconds ahead; pandas, which datasets imports, needs the real class.
COLLECT = """
import datasets, datetime, pytest, sys, time
now, ahead = time.time, float(sys.argv[1])
time.time = lambda: now() + ahead
class Ahead(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
datetime.datetime = Ahead
sys.exit(pytest.main(["--collect-only", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist"]))
"""
MACHINES = (
    {"ahead": "0", "TZ": "EAST-14", "PYTHONHASHSEED": "1", "COLUMNS": "40"},
    {"ahead": "1e7", "TZ": "WEST+11", "PYTHONHASHSEED": "2", "COLUMNS": "200"},
)


def test_the_suite_has_the_same_tests_in_the_same_order_on_another_machine(tmp_path: Path) -> None:
    started = []
    for place, machine in enumerate(MACHINES):
        home = tmp_path / f"home {place}"
        home.mkdir()
        env = {**os.environ, **machine, "HOME": str(home)}
        command = [sys.executable, "-c", COLLECT, machine["ahead"]]
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    here, there = (process.communicate()[0].splitlines()[:-1] for process in started)
    assert [process.returncode for process in started] == [0, 0], "\n".join(here[-20:])
    assert [pair for pair in zip(here, there, strict=True) if pair[0] != pair[1]][:5] == []
    assert len(here) > 1000
    assert unused(here) == [], "expressions of tests/support/thorough.py that match no test"
