"""Answers on disk, one JSON line each. Each batch is written at once, so a killed evaluation can resume.

predictions.jsonl   the answers behind results.json, in the order of the items
predictions.K-of-N.jsonl   the answers of one shard, until all shards are complete
spare.jsonl         answers of earlier selections or settings; reused if their key matches, never scored
judgements.jsonl    the texts of a judge model, for the benchmarks that need one
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora_data.errors import UserError
from milora_data.json_text import parse_json

Line = dict[str, Any]
PREDICTIONS, SPARE, JUDGEMENTS = "predictions.jsonl", "spare.jsonl", "judgements.jsonl"


def each_line(path: Path) -> Iterator[Line]:
    """Yield the lines of a file, none if it does not exist. Skips a last line that a kill has truncated."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="\n", errors="replace") as file:  # answers may hold other line ends
        for text in file:
            try:
                line = parse_json(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "key" in line:
                if not all(isinstance(line.get(name), str) for name in ("benchmark", "id", "prediction")):
                    raise UserError(
                        "a stored answer has no texts for benchmark, id and prediction",
                        code="predictions-format",
                        where=str(path),
                        hint="evaluate again, or restore the file",
                    )
                yield line


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file."""
    return list(each_line(path))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file atomically, line by line: the file is complete or does not exist."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_text(line) for line in lines)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # left over if the disk is full


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder while it is finished: the last two shards may finish at the same time.

    The system releases the lock when the process ends, also after a kill; the lock file stays.
    """
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Store:
    """The answers of one model on one suite, in one folder. `shard` is (number from 1, count)."""

    def __init__(self, folder: Path, shard: tuple[int, int] = (1, 1)) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        number, count = shard
        self.path = folder / (PREDICTIONS if count == 1 else f"predictions.{number}-of-{count}.jsonl")

    def known(self) -> dict[str, str]:
        """Return the texts of all answers in the folder by key, including other shards."""
        return {line["key"]: line["prediction"] for path in self._paths() for line in each_line(path)}

    def open(self) -> None:
        """Prepare for `append`: drop a truncated last line, so that the next line does not continue it."""
        if self.path.is_file():
            write_lines(self.path, each_line(self.path))

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines and sync them to the disk."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(_text(line) for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write `lines` as predictions.jsonl, in their order; move all other answers to spare.jsonl."""
        complete, kept = self.folder / ".complete.jsonl", set()

        def with_keys_noted() -> Iterator[Mapping[str, Any]]:
            for line in lines:
                kept.add(line["key"])
                yield line

        write_lines(complete, with_keys_noted())
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
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can escape it, UTF-8 cannot encode it
        text = json.dumps(line)
    return text + "\n"
