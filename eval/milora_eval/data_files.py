"""Find and read the official files of benchmarks (`--data`); errors say where to download missing ones.

Names of files may be patterns (`data/test-*.parquet`). A table (`.parquet` of a data set of the hub, `.tsv` of
VLMEvalKit) holds the questions and their pictures. pandas reads and writes text tables, as LLaVA's scripts do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_data.assets import cache_dir
from milora_data.formats.jsonfile import not_utf8, read_objects
from milora_data.pictures.load import ImageError, picture_size
from milora_eval.benchmark import Benchmark, Item, MissingData
from milora_vl.common.atomic_write import atomic_file
from milora_vl.common.errors import MALFORMED, DataError, Problem, UserError, collected

if TYPE_CHECKING:
    from pandas import DataFrame

AGAIN = "download the file again"


def existing(data_dir: Path, names: str) -> list[Path]:
    """Return the first file or folder of `names` ("a|b") that exists, or the sorted files of a pattern."""
    for name in names.split("|"):
        paths = sorted(data_dir.glob(name)) if "*" in name else [data_dir / name]
        if paths and paths[0].exists():
            return paths
    return []


def find_all(benchmark: Benchmark, data_dir: Path) -> list[Path]:
    """Return the path of each entry of the benchmark's `files`. Raises MissingData with the expected files."""
    return [find(benchmark, data_dir, names) for names in benchmark.files]


def find(benchmark: Benchmark, data_dir: Path, names: str) -> Path:
    """Return the first existing file or folder of `names` ("a|b"). Raises MissingData with the expected files."""
    if paths := existing(data_dir, names):
        return paths[0]
    # A table replaces all other files, so every entry of `files` has it; the message names it once.
    tables = [name for name in benchmark.files[0].split("|") if is_table(Path(name))]
    parts = [[name for name in spec.removesuffix("|.").split("|") if name not in tables] for spec in benchmark.files]
    specs = ["  or  ".join(part) for part in parts[:4] if part]
    wanted = "\n".join(f"  {spec}" for spec in [*specs[:2], *([";  ".join(specs[2:])] if specs[2:] else [])])
    wanted += ("\nor alone:" if specs and tables else "") + "  " * bool(tables) + "  or  ".join(tables)
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
    """Return the file of a benchmark's questions if it belongs to another data set, else None."""
    if type(benchmark).recognises is Benchmark.recognises:
        return None
    path = next((path for path in existing(data_dir, benchmark.files[0]) if path.is_file()), None)
    if path is None:
        return None
    try:
        first: Any = next(_rows(path, without="image"), {}) if is_table(path) else next(json_values(path), None)
    except UserError:  # whoever reads the file reports it
        return None
    return None if benchmark.recognises(first) else path


def load_items(benchmark: Benchmark, data_dir: Path) -> list[Item]:
    """Return the items of a benchmark. Raises DataError if its official files do not have the published format.

    Exceptions of a user's own benchmark class are not caught: the traceback shows where.
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
    except (*MALFORMED, SyntaxError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        files = ", ".join(name.partition("|")[0] for name in benchmark.files)
        raise DataError(
            f"a file in {data_dir} does not have the published format: {what}",
            code="benchmark-file-format",
            where=f"benchmark {benchmark.name}",
            hint=f"files: {files}\nthey come from: {benchmark.source}",
        ) from None


def json_values(path: Path) -> Iterator[Any]:
    """Yield the values of JSON lines, or of a JSON list. Raises DataError with file and line of broken JSON."""
    return (value for _, value in read_objects(path))


def is_table(path: Path) -> bool:
    return path.suffix in (".parquet", ".tsv")


def table_rows(benchmark: Benchmark, data_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of the tables in `files[0]`, with `picture`, a file in the user's cache, instead of `image`.

    Raises MissingData without files, and DataError that names every row without a readable picture.
    """
    find(benchmark, data_dir, benchmark.files[0])
    problems: list[Problem] = []
    rows = []
    for path in existing(data_dir, benchmark.files[0]):
        found = list(_rows(path)) if path.suffix == ".tsv" else _rows(path)  # a row of a .tsv may name a later one
        pictures = {row["index"]: row.get("image") for row in found} if isinstance(found, list) else {}
        for number, row in enumerate(found, start=1):
            with collected(problems):
                picture = _unpacked(row.get("image"), pictures, f"{path}, row {number}")
                rows.append({name: value for name, value in row.items() if name != "image"} | {"picture": picture})
    if problems:
        raise DataError(problems=problems)
    return rows


def _rows(path: Path, without: str = "") -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, of a parquet file without one of its columns; missing cells of a .tsv are omitted."""
    if path.suffix == ".tsv":
        for row in read_table(path).to_dict("records"):
            yield {str(name): cell for name, cell in row.items() if isinstance(cell, str)}
        return
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name != without]
        for batch in file.iter_batches(64, columns=columns):  # a file may hold a gigabyte of pictures
            yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"cannot be read: {error}", code="table-syntax", where=str(path), hint=AGAIN) from None


def read_table(path: Path) -> DataFrame:
    """Return a tab-separated file, all cells as text; what pandas reads as missing ("None", "NA") is missing."""
    import pandas

    try:
        return pandas.read_csv(path, sep="\t", dtype=str)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except pandas.errors.EmptyDataError:
        return pandas.DataFrame()
    except pandas.errors.ParserError as error:
        raise DataError(f"broken table: {error}", code="table-syntax", where=str(path), hint=AGAIN) from None


def write_excel(path: Path, frame: DataFrame) -> Path:
    """Write one sheet. Control characters are removed; text stays text, even if it looks like a formula."""
    import pandas

    try:
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise _no_openpyxl() from None
    clean = frame.map(lambda cell: ILLEGAL_CHARACTERS_RE.sub("", cell)[:32767] if isinstance(cell, str) else cell)
    with (
        atomic_file(path) as partial,
        partial.open("wb") as file,
        pandas.ExcelWriter(file, engine="openpyxl") as writer,
    ):
        clean.to_excel(writer, index=False)
        for cell in (cell for row in writer.book.active.iter_rows() for cell in row):
            if isinstance(cell.value, str) and cell.value:
                cell.data_type = "s"
    return path


def _no_openpyxl() -> UserError:
    return UserError(".xlsx files need openpyxl", code="package-missing", hint="install it: pip install -e '.[eval]'")


def _unpacked(image: Any, pictures: Mapping[str, Any], where: str) -> Path:
    content = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(content, str) and len(content) <= 64:
        content = pictures.get(content)
    if not content:
        raise DataError("the row has no picture", where=where, hint=AGAIN)
    path = unpack_picture(content, where)
    try:
        picture_size(path)
    except ImageError as error:
        message = f"cannot read the picture: {error.reason}"
        raise DataError(message, code="image-unreadable", where=where, hint=AGAIN) from None
    return path


def unpack_picture(data: str | bytes, where: str) -> Path:
    """Write a picture (bytes or base64) to the user's cache, named by its hash; return its path.

    Raises DataError if it is not base64.
    """
    try:
        content = base64.b64decode(data) if isinstance(data, str) else data
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the picture is not base64: {error}", where=where, hint=AGAIN) from None
    path = cache_dir() / "eval-pictures" / f"{hashlib.sha256(content).hexdigest()[:24]}.img"
    if not path.is_file():
        with atomic_file(path) as partial:  # shards may write the same picture at the same time
            partial.write_bytes(content)
    return path
