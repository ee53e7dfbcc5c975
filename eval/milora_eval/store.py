"""Answers on disk: one JSON line each, written as they come, so that a killed evaluation goes on where it was.

predictions.jsonl   the answers of the results beside it, in the order of the items
predictions.K-of-N.jsonl   those of one shard, until the answers of all are there
spare.jsonl         answers of earlier selections or settings; used again when their key fits, never scored
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
PREDICTIONS, SPARE = "predictions.jsonl", "spare.jsonl"


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file, none if it does not exist; a last one cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "key" in line:
            lines.append(line)
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file as a whole; it is there in full or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(_line(line) for line in lines), encoding="utf-8")
    partial.replace(path)


class Store:
    """The answers of one model to one suite, in one folder. `shard` is (number from 1, count)."""

    def __init__(self, folder: Path, shard: tuple[int, int] = (1, 1)) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        number, count = shard
        self.path = folder / (PREDICTIONS if count == 1 else f"predictions.{number}-of-{count}.jsonl")

    def known(self) -> dict[str, Line]:
        """Return every answer in the folder by its key, those of other shards too."""
        return {line["key"]: line for path in self._paths() for line in read_lines(path)}

    def open(self) -> None:
        """Prepare for `append`: drop a line that was cut off, so that the next one does not continue it."""
        if self.path.is_file():
            write_lines(self.path, read_lines(self.path))

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines; they are in the system's hands when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(_line(line) for line in lines)

    def finish(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Leave exactly `lines` in predictions.jsonl, in their order; every other answer goes to the spare ones."""
        keys = {line["key"] for line in lines}
        spare = {key: line for key, line in self.known().items() if key not in keys}
        if spare:
            write_lines(self.folder / SPARE, spare.values())
        write_lines(self.folder / PREDICTIONS, lines)
        for path in self._paths():
            if path.name not in (SPARE, PREDICTIONS):
                path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return [self.folder / SPARE, *sorted(self.folder.glob("predictions*.jsonl"))]


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
