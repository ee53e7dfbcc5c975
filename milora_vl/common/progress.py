"""Progress on stderr: a bar on a terminal; in a log file a line every ten seconds, without carriage returns."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

INTERVAL = 10.0  # seconds between the lines of a log file


def progress_bar(what: str, total: int, unit: str, *, is_shown: bool = True) -> Any:
    """Return a bar of tqdm that counts `total` units. A log file has no lines for work that ends within INTERVAL."""
    count = "{n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]"
    if sys.stderr.isatty():
        bar_format = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {count}"
        return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=not is_shown, bar_format=bar_format)
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        file=_ProgressLines(sys.stderr),
        disable=not is_shown,
        mininterval=INTERVAL,
        delay=INTERVAL,
        bar_format=f"{{desc}}: {count}",
    )


class _ProgressLines:
    """A stream for tqdm, which begins each state of a bar with a carriage return: here it is a line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write a state as a line; what only moves the cursor writes nothing."""
        if line := text.strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()
