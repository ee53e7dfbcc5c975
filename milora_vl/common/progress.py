"""Progress on stderr: a bar on a terminal; in a log file a line every ten seconds, without carriage returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

INTERVAL = 10.0  # seconds between the lines of a log file


def progress_bar(what: str, total: int, unit: str, *, is_shown: bool = True) -> Any:
    """Return a bar of tqdm that counts `total` units. A log file has no lines for work that ends within INTERVAL.

    Inside `one_bar`, the bar of a planned part moves the bar of the whole instead.
    """
    if _Whole.current is not None and what in _Whole.current.parts:
        return _Part(_Whole.current, what, total)
    count = "{n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]"
    return _tqdm(what, total, unit, count, is_shown)


def _tqdm(what: str, total: float, unit: str, count: str, is_shown: bool) -> Any:
    if sys.stderr.isatty():
        bar_format = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {count}"
        return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=not is_shown, bar_format=bar_format)
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        file=_Lines(sys.stderr),
        disable=not is_shown,
        mininterval=INTERVAL,
        delay=INTERVAL,
        bar_format=f"{{desc}}: {count}",
    )


@contextmanager
def one_bar(
    parts: Sequence[str], plan: Callable[[Sequence[str]], Mapping[str, float]], *, is_shown: bool
) -> Iterator[None]:
    """Show one bar for `parts`, whose bars open inside in this order, with the time left of the whole.

    `plan` is called when the first bar opens, with the names of the parts from it on, and returns their seconds: it is
    not called if caches have all parts. The time of the finished work, against its plan, corrects the time left.
    """
    _Whole.current = _Whole(parts, plan, is_shown)
    try:
        yield
    finally:
        if _Whole.current.bar is not None:
            _Whole.current.bar.close()
        _Whole.current = None


class _Whole:
    current: _Whole | None = None

    def __init__(
        self, parts: Sequence[str], plan: Callable[[Sequence[str]], Mapping[str, float]], is_shown: bool
    ) -> None:
        self.parts, self.plan, self.is_shown = parts, plan, is_shown
        self.seconds: Mapping[str, float] = {}
        self.bar: Any = None

    def begin(self, what: str) -> float:
        """Show the start of a part, and return its planned seconds; those before it are finished, or were cached."""
        left = self.parts[self.parts.index(what) :]
        if self.bar is None:
            self.seconds = self.plan(left)
            self.bar = _tqdm(what, 0.0, "s", "{percentage:.0f}% [{elapsed}<{remaining}]", self.is_shown)
            self.bar.smoothing = 0.0  # the time left is by the mean speed, not by that of the last moment
        self.bar.total = self.bar.n + sum(self.seconds.get(name, 0.0) for name in left)
        self.bar.set_description_str(what, refresh=False)
        return self.seconds.get(what, 0.0)


class _Part:
    """A bar that moves the bar of the whole."""

    def __init__(self, whole: _Whole, what: str, total: int) -> None:
        self.share = whole.begin(what) / max(total, 1)
        self.bar = whole.bar

    def update(self, n: float = 1) -> None:
        """Count `n` more units."""
        self.bar.update(n * self.share)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.refresh()


class _Lines:
    """A stream for tqdm, which begins each state of a bar with a carriage return: here it is a line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write a state as a line; what only moves the cursor writes nothing."""
        if line := text.strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()
