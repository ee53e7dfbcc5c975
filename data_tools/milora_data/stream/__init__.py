"""`load_records`: a data set by name or path: JSON, tables, shards, the hub, or a weighted mixture of such sources.

`record_stream` (dataset.py, which needs torch) reads the same as an endless stream.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import Field, ValidationError, model_validator

from milora_data.formats.jsonfile import missing_file, not_utf8, read_objects
from milora_data.formats.stored import is_stored, stored_items
from milora_data.records.record import Record, parse_record
from milora_vl.common.errors import DataError
from milora_vl.common.strict_models import Strict, problems_of
from milora_vl.common.yaml_text import YamlTextError, parse_yaml

Item: TypeAlias = Record | DataError
AnyItem = TypeVar("AnyItem", Record, Item)


def load_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a data set in order, one at a time; the data set is not held in memory.

    Supported: a JSON list or JSON lines of LLaVA's records or of `messages`; .parquet, .arrow, .tar (webdataset), a
    folder of `save_to_disk` and hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT], which `datasets` reads; .yaml, a mixture.
    Raises `DataError` with file and line if the file is missing, its JSON is broken, or a value is not a record.
    """
    for item in record_items(path):
        if isinstance(item, DataError):
            raise item
        yield item


def record_items(path: str | Path) -> Iterator[Item]:
    """Yield the records of a data set like `load_records`, and a `DataError` in place of each that is broken."""
    if is_json(path):
        yield from json_items(path, partial(read_objects, Path(path)))
    elif str(path).endswith((".yaml", ".yml")):
        yield from mixed_records(*read_sources(Path(path)), read=record_items)
    else:
        yield from stored_items(str(path))


def json_items(
    path: str | Path, objects: Callable[[Callable[[DataError], None]], Iterator[tuple[str, object]]]
) -> Iterator[Item]:
    """Yield the records of the (place, value) of `objects`, or their errors; a list cannot be read beyond its first."""
    broken: list[DataError] = []
    try:
        for place, value in objects(broken.append):
            yield from broken
            broken.clear()
            try:
                yield parse_record(value, source=f"{path}:{place}")
            except DataError as error:
                yield error
    except DataError as error:
        broken.append(error)
    yield from broken


def is_json(path: str | Path) -> bool:
    """Return whether `path` is read as JSON: it is not a mixture and not in a format that `datasets` reads."""
    return not is_stored(path) and Path(path).suffix not in (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Source:
    """One source of a mixture. Weight 2 repeats each of its records; weight 0.3 keeps a random 30 % of them."""

    path: str
    weight: float = 1.0
    image_folder: str | None = None


class _Entry(Strict):
    path: str
    weight: float = Field(default=1.0, ge=0, le=10_000)  # copies of each record
    image_folder: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class _Mixture(Strict):
    sources: list[_Entry] = Field(min_length=1, examples=["[{path: ..., weight: ..., image_folder: ...}]"])
    seed: int = 0


def read_sources(path: Path) -> tuple[list[Source], int]:
    """Return the sources and the seed of a YAML file: `sources: [{path, weight, image_folder}]`, `seed`.

    Paths are relative to the file. Raises `DataError` if the file is missing, its YAML is broken, a key is unknown or a
    weight is below 0.
    """
    if not path.is_file():
        raise missing_file(path)
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except YamlTextError as error:
        raise DataError(f"broken YAML: {error}", code="yaml-syntax", where=str(path)) from None
    try:
        mixture = _Mixture.model_validate({"sources": content} if isinstance(content, list) else content)
    except ValidationError as error:
        problems = [
            replace(one, where=": ".join(filter(None, (str(path), str(one.where)))))
            for one in problems_of(error, _Mixture, "mixture")
        ]
        raise DataError(problems=problems) from None
    return [_placed(entry, path.parent) for entry in mixture.sources], mixture.seed


def _placed(entry: _Entry, folder: Path) -> Source:
    """Return a source whose paths are no longer relative to the folder of its mixture."""
    path = entry.path if entry.path.startswith("hub:") else str(folder / entry.path)
    return Source(path, entry.weight, None if entry.image_folder is None else str(folder / entry.image_folder))


def mixed_records(
    sources: Sequence[Source], seed: int = 0, read: Callable[[str], Iterator[AnyItem]] = load_records
) -> Iterator[AnyItem]:
    """Yield the records of all sources, one source after another, repeated or sampled according to its weight.

    Picture names are joined to the image folder of their source. Raises what `read` raises.
    """
    for number, source in enumerate(sources):
        chance = random.Random(f"{seed} {number}")
        times, share = divmod(source.weight, 1)
        for record in read(source.path):
            copies = int(times) + (chance.random() < share)
            if copies:
                record = within(record, source.image_folder)
            for _ in range(min(copies, 1) if isinstance(record, DataError) else copies):
                yield record


def within(record: AnyItem, image_folder: str | None) -> AnyItem:
    """Return a record (not an error) whose pictures are in the image folder of its source, if the source has one.

    A name that leads out of that folder is not changed; it is then relative to the image folder of the training.
    """
    if image_folder is None or isinstance(record, DataError):
        return record
    return record.within(Path(image_folder).absolute())
