"""Store answers on disk (predictions.jsonl), one line each, batch by batch; shards, spare answers, judgements.

predictions.jsonl   the answers behind results.json, in the order of the items
predictions.K-of-N.jsonl   the answers of one shard, until all shards are complete
spare.jsonl         answers of earlier selections or settings; reused if their key matches, never scored
judgements.jsonl    the texts of a judge model, for the benchmarks that need one
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from milora_vl.base.atomic_write import atomic_file
from milora_vl.base.errors import UserError

Line = dict[str, Any]
PREDICTIONS, SPARE, JUDGEMENTS = "predictions.jsonl", "spare.jsonl", "judgements.jsonl"
_KEY = re.compile("[0-9a-f]{16}")


def each_line(path: Path) -> Iterator[Line]:
    """Yield the lines of a file, none if it does not exist. Skips a last line that a kill has truncated."""
    if path.is_file():
        with path.open("rb") as file:
            yield from (line for _, line in _located(file, path))


def _located(file: BinaryIO, path: Path) -> Iterator[tuple[int, Line]]:
    """Yield the lines of an open file, each with the number of its first byte."""
    start = 0
    for text in file:  # bytes end at a newline alone; answers may hold other line ends
        line = _parsed(text)
        if line is not None:
            if not all(isinstance(line.get(name), str) for name in ("benchmark", "id", "prediction")):
                raise UserError(
                    "a stored answer has no texts for benchmark, id and prediction",
                    code="predictions-format",
                    where=str(path),
                    hint="evaluate again, or restore the file",
                )
            yield start, line
        start += len(text)


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text.decode("utf-8", "replace"))
    except ValueError:
        return None
    return line if isinstance(line, dict) and "key" in line else None


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file."""
    return list(each_line(path))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file atomically, line by line: the file is complete or does not exist."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_text(line) for line in lines)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder while it is finished: the last two shards may finish at the same time.

    The system releases the lock when the process ends, also after a kill; the lock file stays.
    """
    with FileLock(folder / ".lock"):
        yield


def key_number(key: object) -> int:
    """Return the key of an answer as a number of 64 bits: its 16 hexadecimal digits, a hash of any other key."""
    text = str(key)
    if _KEY.fullmatch(text):
        return int(text, 16)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


def is_among(keys: NDArray[np.uint64], sorted_keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return (n,): whether each key is one of `sorted_keys`. Unlike `np.isin` it sorts no copy of both."""
    if not len(sorted_keys):
        return np.zeros(len(keys), dtype=np.bool_)
    places = np.searchsorted(sorted_keys, keys)
    np.minimum(places, len(sorted_keys) - 1, out=places)
    return sorted_keys[places] == keys


class Known(Mapping[str, str]):
    """The texts of stored answers by key, read from their files when asked for; of equal keys, the last one.

    Memory holds 18 bytes of each answer; `numbers` are the keys as sorted numbers. The files stay open, since another
    shard may replace them by complete ones.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files = [(path.open("rb"), path) for path in paths if path.is_file()]
        keys, starts, numbers = array("Q"), array("Q"), array("H")
        for number, (file, path) in enumerate(self._files):
            for start, line in _located(file, path):
                keys.append(key_number(line["key"]))
                starts.append(start)
                numbers.append(number)
        # The first of equal keys in the reversed order is the last one in the order of the files.
        self.numbers, last = np.unique(np.frombuffer(keys, np.uint64)[::-1], return_index=True)
        self._starts = np.frombuffer(starts, np.uint64)[::-1][last]
        self._file_numbers = np.frombuffer(numbers, np.uint16)[::-1][last]

    def __enter__(self) -> Known:
        return self

    def __exit__(self, *error: object) -> None:
        for file, _ in self._files:
            file.close()

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[str]:
        return (line["key"] for line in self.lines(np.arange(len(self))))

    def __getitem__(self, key: str) -> str:
        place = int(np.searchsorted(self.numbers, np.uint64(key_number(key))))
        if place < len(self):
            line = self._line(place)
            if line["key"] == key:
                return str(line["prediction"])
        raise KeyError(key)

    def holds(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return (n,): whether each key, as a number, has an answer."""
        return is_among(keys, self.numbers)

    def lines(self, places: NDArray[np.int64]) -> Iterator[Line]:
        """Yield the lines of the keys at `places`, in the order of the files."""
        order = np.lexsort((self._starts[places], self._file_numbers[places]))
        return (self._line(place) for place in places[order].tolist())

    def _line(self, place: int) -> Line:
        file, _ = self._files[self._file_numbers[place]]
        file.seek(int(self._starts[place]))
        line = _parsed(file.readline())
        assert line is not None
        return line


class Store:
    """The answers of one model on one suite, in one folder. `shard` is (number from 1, count)."""

    def __init__(self, folder: Path, shard: tuple[int, int] = (1, 1)) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        number, count = shard
        self.path = folder / (PREDICTIONS if count == 1 else f"predictions.{number}-of-{count}.jsonl")

    def known(self) -> Known:
        """Return the texts of all answers in the folder by key, including other shards. Use it in a `with`."""
        return Known(self._paths())

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
        complete, kept = self.folder / ".complete.jsonl", array("Q")

        def with_keys_noted() -> Iterator[Mapping[str, Any]]:
            for line in lines:
                kept.append(key_number(line["key"]))
                yield line

        write_lines(complete, with_keys_noted())
        with self.known() as known:
            spare = np.flatnonzero(~is_among(known.numbers, np.unique(np.frombuffer(kept, np.uint64))))
            if len(spare):
                write_lines(self.folder / SPARE, known.lines(spare))
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
