"""Find, read and write the official files of benchmarks (`--data`); errors say where to download missing ones."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.assets import cache_dir
from milora_data.formats.jsonfile import not_utf8, read_objects
from milora_eval.benchmark import Benchmark, Item, MissingData
from milora_vl.base.atomic_write import atomic_file, write_text
from milora_vl.base.errors import MALFORMED, DataError, UserError, with_context

# Texts that pandas reads as NaN: LLaVA's scripts read their tables with pandas.
NOT_A_NUMBER = frozenset(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null|".split("|")
)


def find(benchmark: Benchmark, data_dir: Path, names: str) -> Path:
    """Return the first existing file or folder of `names` ("a|b"). Raises MissingData with the expected files."""
    for name in names.split("|"):
        if (data_dir / name).exists():
            return data_dir / name
    specs = [spec.removesuffix("|.").replace("|", "  or  ") for spec in benchmark.files[:4]]
    wanted = "\n".join(f"  {spec}" for spec in [*specs[:2], *([";  ".join(specs[2:])] if specs[2:] else [])])
    source = f"\nthey come from: {benchmark.source}" if benchmark.source else ""
    raise MissingData(
        f"no {names.removesuffix('|.').replace('|', ' or ')} in {data_dir}"
        if data_dir.is_dir()
        else f"no folder {data_dir} (--data)",
        code="eval-missing-files",
        where=f"benchmark {benchmark.name}",
        hint=f"put there:\n{wanted}{source}",
    )


def other_questions(benchmark: Benchmark, data_dir: Path) -> Path | None:
    """Return the file of a benchmark's questions if it has those of another data set, else None."""
    if type(benchmark).recognises is Benchmark.recognises:
        return None
    path = next((data_dir / name for name in benchmark.files[0].split("|") if (data_dir / name).is_file()), None)
    if path is None:
        return None
    try:
        first = next((value for _, value in read_objects(path)), None)
    except DataError:  # whoever reads the file reports it
        return None
    return None if benchmark.recognises(first) else path


def load_items(benchmark: Benchmark, data_dir: Path) -> list[Item]:
    """Return the items of a benchmark. Raises DataError if its official files do not have the published format.

    Exceptions of a user's own benchmark class are not caught: the traceback shows their place.
    """
    if not type(benchmark).__module__.startswith("milora_eval."):
        return benchmark.load(data_dir)
    if (path := other_questions(benchmark, data_dir)) is not None:
        raise DataError(
            "has other questions than this benchmark",
            code="benchmark-file-format",
            where=f"benchmark {benchmark.name}: {path}",
            hint=f"ask them with  --benchmarks {path}",
        )
    try:
        return benchmark.load(data_dir)
    except UserError:
        raise
    except (*MALFORMED, SyntaxError, csv.Error) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        files = ", ".join(name.partition("|")[0] for name in benchmark.files)
        raise DataError(
            f"a file in {data_dir} does not have the published format: {what}",
            code="benchmark-file-format",
            where=f"benchmark {benchmark.name}",
            hint=f"files: {files}\nthey come from: {benchmark.source}",
        ) from None


def read_jsonl(path: Path) -> Iterator[Any]:
    """Yield the values of a JSONL file. Raises DataError with the line if one is not JSON or not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise with_context(not_utf8(path, error), f"line {number}") from None
                except ValueError as error:
                    raise DataError(
                        f"not JSON: {error}",
                        code="json-syntax",
                        where=f"{path}:{number}",
                        hint="download the file again",
                    ) from None


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a JSON list of objects, or JSON lines if the name ends in .jsonl."""
    if path.suffix == ".jsonl":
        return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return write_text(path, json.dumps(rows, ensure_ascii=False))


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a tab-separated file with a header, as text; values that pandas reads as NaN are omitted."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", restkey="")
            return [
                {key: text for key, text in row.items() if isinstance(text, str) and text not in NOT_A_NUMBER}
                for row in rows
            ]
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except csv.Error as error:
        raise DataError(
            f"broken table: {error}", code="table-syntax", where=str(path), hint="download the file again"
        ) from None


def table_columns(path: Path) -> list[str]:
    """Return the header of a tab-separated file."""
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file, delimiter="\t"), [])


def unpack_picture(data: str | bytes, place: str) -> Path:
    """Write a picture (bytes or base64) to the user's cache, named by its hash; return its path.

    Raises DataError if it is not base64.
    """
    try:
        content = base64.b64decode(data) if isinstance(data, str) else data
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"the picture is not base64: {error}",
            code="data-picture-base64",
            where=place,
            hint="download the file again",
        ) from None
    path = cache_dir() / "eval-pictures" / f"{hashlib.sha256(content).hexdigest()[:24]}.img"
    if not path.is_file():
        with atomic_file(path) as partial:  # shards may write the same picture at the same time
            partial.write_bytes(content)
    return path
