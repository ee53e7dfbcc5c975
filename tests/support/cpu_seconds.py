"""`pytest --cpu-seconds`: the CPU time of each test file and folder, with the processes that the tests started.

CPU time says more than the clock where other programs run. A fixture counts for the test that it is made for.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import pytest

from support import programs


def cpu_seconds() -> float:
    """Return the CPU time of this process, of its children and of the programs that have ended, in seconds."""
    return sum(os.times()[:4]) + programs.seconds_of_ended


class CpuSeconds:
    """Measures each phase of each test where it runs; sums them up where the session ends."""

    def __init__(self) -> None:
        self.tests: dict[str, float] = defaultdict(float)
        self.started = cpu_seconds()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        outcome = yield
        ended = cpu_seconds()
        outcome.get_result().cpu_seconds = ended - self.started  # type: ignore[attr-defined]  # xdist sends it on
        self.started = ended

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self.started = cpu_seconds()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += getattr(report, "cpu_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        for title, sums in (
            ("folder", summed(self.tests, lambda name: PurePosixPath(name.partition("::")[0]).parent.as_posix())),
            ("file", summed(self.tests, lambda name: name.partition("::")[0])),
            ("test", self.tests),
        ):
            write(f"CPU seconds of each {title} ({sum(sums.values()):.0f} in all)")
            for name, seconds in sorted(sums.items(), key=lambda row: -row[1])[:60]:
                if seconds >= 1:
                    write(f"{seconds:8.1f}  {name}")


def summed(tests: dict[str, float], of: Callable[[str], str]) -> dict[str, float]:
    """Return the sum of each group of tests; `of` names the group of a test."""
    sums: dict[str, float] = defaultdict(float)
    for name, seconds in tests.items():
        sums[of(name)] += seconds
    return sums


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", action="store_true", help="print the CPU time of each test file at the end")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cpu-seconds"):
        config.pluginmanager.register(CpuSeconds())
