"""Answers on disk: one JSON line each, written as they come, so that a killed evaluation goes on where it was.

predictions.jsonl   the answers of the results beside it, in the order of the items
predictions.K-of-N.jsonl   those of one shard, until the answers of all are there
spare.jsonl         answers of earlier selections or settings; used again when their key fits, never scored
judgements.jsonl    what a judge model said to answers, for the benchmarks that need one
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Line = dict[str, Any]
PREDICTIONS, SPARE, JUDGEMENTS = "predictions.jsonl", "spare.jsonl", "judgements.jsonl"


def each_line(path: Path) -> Iterator[Line]:
    """Yield the lines of a file one by one, none if it does not exist; a last one cut off by a kill is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="\n", errors="replace") as file:  # answers may hold other line ends
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "key" in line:
                yield line


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file."""
    return list(each_line(path))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file as a whole, line by line; it is there in full or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_text(line) for line in lines)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # of a full disk


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait while another process finishes the same folder, as the last two shards may do at one moment.

    The system drops the lock when its process ends, however that happens; the file stays.
    """
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Store:
    """The answers of one model to one suite, in one folder. `shard` is (number from 1, count)."""

    def __init__(self, folder: Path, shard: tuple[int, int] = (1, 1)) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        number, count = shard
        self.path = folder / (PREDICTIONS if count == 1 else f"predictions.{number}-of-{count}.jsonl")

    def known(self) -> dict[str, str]:
        """Return every answer's text in the folder by its key, those of other shards too."""
        return {line["key"]: line["prediction"] for path in self._paths() for line in each_line(path)}

    def open(self) -> None:
        """Prepare for `append`: drop a line that was cut off, so that the next one does not continue it."""
        if self.path.is_file():
            write_lines(self.path, each_line(self.path))

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines; they are on the disk when this returns."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(_text(line) for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Leave exactly `lines` in predictions.jsonl, in their order; every other answer goes to the spare ones."""
        complete, kept = self.folder / ".complete.jsonl", set()

        def noted() -> Iterator[Mapping[str, Any]]:
            for line in lines:
                kept.add(line["key"])
                yield line

        write_lines(complete, noted())
        spare = {line["key"]: line for path in self._paths() for line in each_line(path) if line["key"] not in kept}
        if spare:
            write_lines(self.folder / SPARE, spare.values())
        complete.replace(self.folder / PREDICTIONS)
        for path in self._paths():
            if path.name not in (SPARE, PREDICTIONS):
                path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return [self.folder / SPARE, *sorted(self.folder.glob("predictions*.jsonl"))]


def _text(line: Mapping[str, Any]) -> str:
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 cannot hold and JSON can
        text = json.dumps(line)
    return text + "\n"
