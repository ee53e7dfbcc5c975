"""Read and write the objects of a JSON list or of JSON lines one at a time; errors show the line and an excerpt."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from milora_data.formats.saved import is_saved
from milora_data.pictures.files import SUFFIXES
from milora_vl.base.atomic_write import atomic_file
from milora_vl.base.errors import DataError, with_context
from milora_vl.cli.command_line import beside, command_line
from milora_vl.cli.web import url_problem

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_NEIGHBOUR = re.compile(r"[ \t]*,[ \t]*[^ \t\n\r]")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_DECODER = json.JSONDecoder()
TO_UTF8 = (
    "save it as UTF-8 (in a spreadsheet: CSV UTF-8); convert a file from Windows with:\n"
    "  iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
)


def read_objects(path: Path, on_error: Callable[[DataError], None] | None = None) -> Iterator[tuple[str, object]]:
    """Yield (place, value) for each element of a JSON list, or for each line of JSON lines.

    The place is the number of the first line of an element, and also the number of the element if several share the
    line: "7", "1, record 57". All places are different.
    Raises `DataError` with file, line and an excerpt with a caret. With `on_error`, a broken line of JSON lines and an
    element with bytes that are not UTF-8 are passed to it and skipped. A list with broken JSON still raises, as the
    start of the next element is unknown.
    """
    if not path.is_file():
        raise missing_file(path)
    try:
        # Bytes that are not UTF-8 are read as lone surrogates: only their record is lost, not the whole file.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _Reader(path, file, on_error).objects()
    except OSError as error:
        hint = "change its permissions, or copy it again"
        raise DataError(
            f"cannot be read: {error.strerror}", code="data-unreadable", where=str(path), hint=hint
        ) from None


class Part(NamedTuple):
    """A part of a JSON file: bytes `start` to `end` of JSON lines, starting at `line`, or each `step`-th element."""

    path: str
    start: int
    end: int
    line: int
    step: int = 0


def parts_of(path: Path, count: int, processes: int = 1) -> list[Part]:
    """Return about `count` parts of a file of JSON lines, or `processes` parts of a list, which is read as a whole.

    Each object is in exactly one part; `read_part` reads a part. Raises `DataError` if the file is missing.
    """
    if not path.is_file():
        raise missing_file(path)
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
    """Write a JSON list with one element per line, or JSON lines if `path` ends in .jsonl; return the number written.

    The file appears only when it is complete. Raises `DataError` if the file exists.
    """
    if path.exists():
        raise DataError(f"{path} exists already", code="output-exists", hint="nothing was written; name a new file")
    lines = path.suffix == ".jsonl"
    count = 0
    with atomic_file(path) as part, part.open("w", encoding="utf-8") as file:
        for count, value in enumerate(objects, start=1):
            file.write("" if lines else "[\n" if count == 1 else ",\n")
            file.write(json.dumps(value, ensure_ascii=False) + ("\n" if lines else ""))
        file.write("" if lines else "\n]\n" if count else "[]\n")
    return count


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises `DataError` with file and line."""
    if not path.is_file():
        raise missing_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg}", code="json-syntax", where=f"{path}:{error.lineno}") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except ValueError as error:
        raise DataError(f"broken JSON: {error}", code="json-syntax", where=str(path)) from None


def not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    """Return the error for a text in another encoding; its hint is a command that converts the file."""
    byte = error.object[error.start]
    return DataError(
        f"not UTF-8 (byte 0x{byte:02x})",
        code="data-not-utf8",
        where=str(path),
        hint=TO_UTF8,
    )


def missing_file(path: Path) -> DataError:
    """Return the error for a data file that does not exist; its hint lists the JSON files beside it."""
    problem = url_problem(path)
    if problem is not None:
        return DataError(problems=[problem])
    hints = []
    if path.is_dir():
        folder, code, message = path, "data-folder", "this is a folder; expected a JSON or JSONL file"
        if is_saved(path):
            call = command_line("milora_data", "convert", "--from", "hub", path, "--output_dir", "OUT")
            hints.append(f"it was written by save_to_disk of datasets: {call}")
        for kind in (".parquet", ".tar"):
            hints += [f"name its files: '{path}/*{kind}'"] if any(path.glob(f"*{kind}")) else []
        if any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
            call = command_line("milora_data", "convert", "--from", "folder", path, "--output_dir", "OUT")
            hints.append(f"convert its pictures and captions to records: {call}")
    else:
        folder, code, message = path.parent, "data-missing-file", "no such file"
    names = sorted(p.name for p in folder.glob("*.json*"))[:5] if folder.is_dir() else []
    hints += [f"in {folder}: {', '.join(names)}"] if names else []
    hints = hints or [beside(path)]
    return DataError(message, code=code, where=str(path), hint="\n".join(hints))


class _Reader:
    """A window on the file. `text[at:]` is not consumed yet; `line` is the line number at position `at`."""

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
            except (ValueError, RecursionError) as error:  # a number with thousands of digits; deeply nested lists
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
        match = _NOT_UTF8.search(self.text, self.at, end)
        if match is None:
            return None
        line = self.line + self.text.count("\n", self.at, match.start())
        before = self.text[self.text.rfind("\n", 0, match.start()) + 1 : match.start()]
        column = len(before.encode("utf-8", "surrogateescape")) + 1
        byte = ord(match[0]) - 0xDC00
        return DataError(
            f"not UTF-8 (byte 0x{byte:02x} at column {column})",
            code="data-not-utf8",
            where=f"{self.path}:{line}",
            hint=TO_UTF8,
        )

    def _line_end(self) -> int:
        while (end := self.text.find("\n", self.at)) < 0:
            if not self._more():
                return len(self.text)
        return end

    def _value(self) -> tuple[object, DataError | None]:
        """Return the next element of the list and an error if its bytes are not UTF-8, else None."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # The element may end beyond the window: read more and try again.
                if not self._more():
                    ended = not self.text[error.pos :].strip() or error.msg.startswith("Unterminated string")
                    if ended:
                        raise self._cut_off() from None
                    raise self._error(error.pos, error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self._error(self.at, str(error)) from None
            else:
                if end == len(self.text) and self._more():
                    continue  # a number may continue beyond the window
                broken = self._not_utf8(end)
                self._advance(end)
                return value, broken

    def _skip(self) -> str:
        """Skip white space and return the next character, "" at the end of the file."""
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
        # Doubling the window keeps the total work for a long record linear, although it is parsed again each time.
        added = self.file.read(max(_CHUNK, len(self.text) - self.at))
        if added:
            self.text, self.at = self.text[self.at :] + added, 0
        return bool(added)

    def _cut_off(self) -> DataError:
        """Return the error of a list without its end, at the last character that the file has."""
        error = self._error(max(len(self.text.rstrip()) - 1, 0), "the file ends in the middle of the list")
        return with_context(error, hint="the file is incomplete: copy or download it again")

    def _error(self, position: int, message: str) -> DataError:
        line = self.line + self.text.count("\n", self.at, position) - self.text.count("\n", position, self.at)
        start = self.text.rfind("\n", 0, position) + 1
        end = self.text.find("\n", position)
        end = len(self.text) if end < 0 else end
        left, right = max(start, position - 50), min(end, position + 30)
        excerpt = self.text[left:right].replace("\t", " ").rstrip("\r")
        message = message[0].lower() + message[1:]
        return DataError(
            f"broken JSON: {message}\n  {excerpt}\n  {' ' * (position - left)}^",
            code="json-syntax",
            where=f"{self.path}:{line}",
        )
