"""The terminal output of a run, beside the progress bars: lines, warnings, slow steps, blocks of named values.

Only rank 0 writes. Colour appears only on a terminal; rich follows NO_COLOR and COLUMNS.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console


class Screen:
    """All output of a run except HF's progress bar."""

    def __init__(self, stream: TextIO | None = None) -> None:
        quiet = os.environ.get("RANK", "0") != "0"
        self.console = Console(file=stream or sys.stderr, quiet=quiet, highlight=False)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = 110  # a log file needs no narrow lines

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        self.say(f"{what} ...")
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if seconds >= 1:
            self.say(f"  done in {seconds:.0f} s")

    def block(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print rows with a name each: what a run is at its start, and where everything is at its end."""
        width = max(len(name) for name, _ in rows)
        self.console.print()
        for name, value in rows:
            self.say(f"{name:<{width}}  {value}")
