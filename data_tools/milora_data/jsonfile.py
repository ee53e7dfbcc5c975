"""Reads and writes the objects of a JSON list or of JSON lines one by one, and points at what is broken."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from milora_data.command import command_line
from milora_data.errors import DataError

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_NEIGHBOUR = re.compile(r"[ \t]*,[ \t]*[^ \t\n\r]")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_DECODER = json.JSONDecoder()


def read_objects(path: Path, on_error: Callable[[DataError], None] | None = None) -> Iterator[tuple[str, object]]:
    """Yield (place, value) for each element of a JSON list, or for each line of JSON lines.

    The place is the number of the line it starts on, and of the element where it shares that line with others, as in a
    list without line breaks: "7", "1, record 57". No two elements have the same.
    Raises `DataError` with file, line and an excerpt with a caret. With `on_error`, a broken line of JSON lines, or an
    element with bytes that are not UTF-8, is handed to it and left out; a list of broken JSON still raises, as nothing
    is known of what follows.
    """
    if not path.is_file():
        raise DataError(missing_file(path))
    try:
        # Bytes that are not UTF-8 pass as lone surrogates: they cost the record that holds them, not the file.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _Reader(path, file, on_error).objects()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


class Part(NamedTuple):
    """A part of a JSON file: bytes `start` to `end` of JSON lines, from `line` on, or every `step`-th of a list."""

    path: str
    start: int
    end: int
    line: int
    step: int = 0


def parts_of(path: Path, count: int, processes: int = 1) -> list[Part]:
    """Return about `count` parts of a file of JSON lines; of a list, which must be read as a whole, `processes` parts.

    Every object lies in one of them; `read_part` reads it. Raises `DataError`: no such file.
    """
    if not path.is_file():
        raise DataError(missing_file(path))
    with path.open("rb") as file:
        if file.read(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").startswith(b"["):
            return [Part(str(path), first, 0, 1, processes) for first in range(processes)]
        size = path.stat().st_size
        file.seek(0)
        parts: list[Part] = []
        start, at, first = 0, 0, 1
        for number, line in enumerate(file, start=2):
            at += len(line)
            if at >= size * (len(parts) + 1) // count:
                parts.append(Part(str(path), start, at, first))
                start, first = at, number
    return parts


def read_part(part: Part, on_error: Callable[[DataError], None] | None = None) -> Iterator[tuple[str, object]]:
    """Yield (place, value) of each object in a part, like `read_objects`."""
    path = Path(part.path)
    if part.step:
        for number, pair in enumerate(read_objects(path, on_error)):
            if number % part.step == part.start:
                yield pair
        return
    with path.open("rb") as file:
        file.seek(part.start)
        content = file.read(part.end - part.start).decode("utf-8", "surrogateescape")
    yield from _Reader(path, io.StringIO(content.removeprefix("\ufeff")), on_error, part.line).lines()


def write_objects(path: Path, objects: Iterable[object]) -> int:
    """Write a JSON list with one element a line, or JSON lines if `path` ends in .jsonl; returns how many.

    The file appears only when it is complete; one that exists is never replaced (`DataError`).
    """
    if path.exists():
        raise DataError(f"{path} exists already\nnothing was written; name a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    lines = path.suffix == ".jsonl"
    count = 0
    try:
        with part.open("w", encoding="utf-8") as file:
            for count, value in enumerate(objects, start=1):
                file.write("" if lines else "[\n" if count == 1 else ",\n")
                file.write(json.dumps(value, ensure_ascii=False) + ("\n" if lines else ""))
            file.write("" if lines else "\n]\n" if count else "[]\n")
    except BaseException:
        part.unlink()
        raise
    part.rename(path)
    return count


def missing_file(path: Path) -> str:
    """Return the message for a data file that is not there, with the JSON files that are."""
    if path.is_dir():
        from milora_data.captions import SUFFIXES

        found, text = path, f"{path}: this is a folder; expected a JSON or JSONL file"
        if any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
            call = command_line("milora_data", "convert", "--from", "folder", path, "--output_dir", "OUT")
            text += f"\nof pictures and captions records are made by: {call}"
    else:
        found, text = path.parent, f"{path}: no such file"
    names = sorted(p.name for p in found.glob("*.json*"))[:5] if found.is_dir() else []
    return text + (f"\nin {found}: {', '.join(names)}" if names else "")


class _Reader:
    """A window on the file: `text[at:]` is not consumed yet, `line` is the number of the line `at` stands on."""

    def __init__(self, path: Path, file: TextIO, on_error: Callable[[DataError], None] | None, line: int = 1) -> None:
        self.path, self.file, self.on_error = path, file, on_error
        self.text, self.at, self.line = "", 0, line

    def objects(self) -> Iterator[tuple[str, object]]:
        """Yield (place, value) of every element."""
        if self._skip() == "[":
            self._advance(self.at + 1)
            yield from self._elements()
        else:
            yield from self.lines()

    def _elements(self) -> Iterator[tuple[str, object]]:
        following = self._skip()
        number, before = 0, 0
        while following != "]":
            line = self.line
            value, error = self._value()
            number += 1
            shared = line == before or (line == self.line and _NEIGHBOUR.match(self.text, self.at) is not None)
            place, before = f"{line}, record {number}" if shared else f"{line}", line
            if error is None:
                yield place, value
            else:
                self._report(error)
            following = self._skip()
            if following == ",":
                self._advance(self.at + 1)
                if self._skip() == "]":
                    raise self._error(self.at, "a comma before the end of the list")
            elif following != "]":
                raise self._error(self.at, "expected ',' or ']' after a record")
        self._advance(self.at + 1)
        if self._skip():
            raise self._error(self.at, "text after the end of the list")

    def lines(self) -> Iterator[tuple[str, object]]:
        """Yield (place, value) of every line."""
        while self._skip():
            end = self._line_end()
            broken = self._not_utf8(end)
            try:
                value = None if broken else json.loads(self.text[self.at : end])
            except json.JSONDecodeError as error:
                hint = "; expected a list [...] or one record per line" if self.line == 1 else ""
                broken = self._error(self.at + error.pos, error.msg + hint)
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
                broken = self._error(self.at, str(error))
            if broken is None:
                yield f"{self.line}", value
            else:
                self._report(broken)
            self._advance(end)

    def _report(self, error: DataError) -> None:
        if self.on_error is None:
            raise error
        self.on_error(error)

    def _not_utf8(self, end: int) -> DataError | None:
        found = _NOT_UTF8.search(self.text, self.at, end)
        if found is None:
            return None
        line = self.line + self.text.count("\n", self.at, found.start())
        before = self.text[self.text.rfind("\n", 0, found.start()) + 1 : found.start()]
        column = len(before.encode("utf-8", "surrogateescape")) + 1
        byte = ord(found[0]) - 0xDC00
        return DataError(f"{self.path}:{line}: not UTF-8 (byte 0x{byte:02x} at column {column})")

    def _line_end(self) -> int:
        while (end := self.text.find("\n", self.at)) < 0:
            if not self._more():
                return len(self.text)
        return end

    def _value(self) -> tuple[object, DataError | None]:
        """Return the next element of the list, or None and what is wrong with its bytes."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # It may only be cut off by the end of the window.
                if not self._more():
                    ended = not self.text[error.pos :].strip() or error.msg.startswith("Unterminated string")
                    message = "the file ends in the middle of the list" if ended else error.msg
                    raise self._error(error.pos, message) from None
            except (ValueError, RecursionError) as error:
                raise self._error(self.at, str(error)) from None
            else:
                if end == len(self.text) and self._more():
                    continue  # a number may go on
                broken = self._not_utf8(end)
                self._advance(end)
                return value, broken

    def _skip(self) -> str:
        """Pass over white space and return the next character, "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self._advance(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _more(self) -> bool:
        # Reading as much again as is waiting keeps the repeated attempts at a long record linear.
        added = self.file.read(max(_CHUNK, len(self.text) - self.at))
        if added:
            self.text, self.at = self.text[self.at :] + added, 0
        return bool(added)

    def _error(self, position: int, message: str) -> DataError:
        line = self.line + self.text.count("\n", self.at, position)
        start = self.text.rfind("\n", 0, position) + 1
        end = self.text.find("\n", position)
        end = len(self.text) if end < 0 else end
        left, right = max(start, position - 50), min(end, position + 30)
        excerpt = self.text[left:right].replace("\t", " ").rstrip("\r")
        message = message[0].lower() + message[1:]
        return DataError(f"{self.path}:{line}: broken JSON: {message}\n  {excerpt}\n  {' ' * (position - left)}^")
