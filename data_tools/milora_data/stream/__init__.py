"""`load_records`: a data set by name or path: JSON, tables, shards, the hub. `mixed_records`: several, by weight.

`record_stream` (dataset.py, which needs torch) reads the same as an endless stream.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from milora_data.formats.jsonfile import read_objects
from milora_data.formats.stored import is_stored, stored_items
from milora_data.records import parse_record
from milora_data.records.record import Record
from milora_vl.common.errors import DataError
from milora_vl.common.strict_models import Strict

AnyRecord = TypeVar("AnyRecord", Record, Record | DataError)


def load_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a data set in order, one at a time; the data set is not held in memory.

    Supported: a JSON list or JSON lines of LLaVA's records or of `messages`; .parquet, .arrow, .tar (webdataset), a
    folder of `save_to_disk` and hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT], which `datasets` reads.
    Raises `DataError` with file and line if the file is missing, its JSON is broken, or a value is not a record.
    """
    for item in record_items(path):
        if isinstance(item, DataError):
            raise item
        yield item


def record_items(path: str | Path) -> Iterator[Record | DataError]:
    """Yield the records of a data set like `load_records`, and a `DataError` in place of each that is broken."""
    if is_stored(path):
        yield from stored_items(str(path))
    else:
        yield from json_items(path, partial(read_objects, Path(path)))


def json_items(
    path: str | Path, objects: Callable[[Callable[[DataError], None]], Iterator[tuple[str, object]]]
) -> Iterator[Record | DataError]:
    """Yield the records of the (line, value) of `objects`, or their errors; a list cannot be read beyond its first."""
    broken: list[DataError] = []
    try:
        for line, value in objects(broken.append):
            yield from broken
            broken.clear()
            try:
                yield parse_record(value, source=f"{path}:{line}")
            except DataError as error:
                yield error
    except DataError as error:
        broken.append(error)
    yield from broken


class Source(Strict):
    """One of several sources. Weight 2 repeats each of its records; weight 0.3 keeps a random 30 % of them."""

    path: str
    weight: float = Field(default=1.0, ge=0, le=10_000)
    image_folder: str | None = None


def mixed_records(
    sources: Sequence[Source], read: Callable[[str], Iterator[AnyRecord]] = load_records
) -> Iterator[AnyRecord]:
    """Yield the records of all sources, one source after another, repeated or sampled according to its weight.

    Picture names are joined to the image folder of their source. Raises what `read` raises.
    """
    for number, source in enumerate(sources):
        chance = random.Random(f"0 {number}")
        times, share = divmod(source.weight, 1)
        for record in read(source.path):
            copies = int(times) + (chance.random() < share)
            if copies:
                record = within(record, source.image_folder)
            for _ in range(min(copies, 1) if isinstance(record, DataError) else copies):
                yield record


def within(record: AnyRecord, image_folder: str | None) -> AnyRecord:
    """Return a record (not an error) whose pictures are in the image folder of its source, if the source has one.

    A name that leads out of that folder is not changed; it is then relative to the image folder of the training.
    """
    if image_folder is None or isinstance(record, DataError):
        return record
    return record.within(Path(image_folder).absolute())
