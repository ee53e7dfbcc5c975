"""Records from parquet files, webdataset shards and sets of the hub, read row by row with `datasets`.

Pictures are not decoded here: they come as `StoredPicture`, a name with the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError, UserError
from .images import StoredPicture
from .jsonfile import missing_file
from .other_files import COLUMNS, row_record
from .records import Record, parse_record
from .vqa_files import Options

HUB = "hub:"
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
_TEXT_KEYS = ("txt", "caption", "cls")  # what webdataset shards call the text beside a picture


def stored_records(source: str, options: Options | None = None) -> Iterator[Record]:
    """Yield the records of FILE.parquet, FILE.tar (or a pattern with *), or hub:OWNER/NAME[:SPLIT].

    Rows are LLaVA records, `messages`, or have columns for picture, question and answer, or picture and caption.
    Raises `DataError` with the number of the row.
    """
    for item in stored_items(source, options):
        if isinstance(item, DataError):
            raise item
        yield item


def stored_items(source: str, options: Options | None = None) -> Iterator[Record | DataError]:
    """Yield the records of a source, and in the place of a row that is none what is wrong with it."""
    for number, row in enumerate(open_stored(source)):
        try:
            yield row_to_record(row, f"{source}:{number}", str(number), options)
        except DataError as error:
            yield error


def row_to_record(row: Mapping[str, Any], place: str, number: str, options: Options | None = None) -> Record:
    """Return the record of one row of `open_stored`; `number` is its id unless it has one. Raises `DataError`."""
    plain = {key: value for key, value in _plain(row, number).items() if value is not None}
    if "conversations" in plain or "messages" in plain:
        return parse_record(plain, source=place)
    return parse_record(row_record(plain, options or Options(), place=place, identifier=number), source=place)


def open_stored(source: str) -> Any:
    """Return a source as a `datasets.IterableDataset` whose pictures are not decoded. Raises `UserError`."""
    import datasets

    try:
        if source.startswith(HUB):
            name, _, split = source.removeprefix(HUB).partition(":")
            found = datasets.load_dataset(name, split=split or "train", streaming=True)
        else:
            files = sorted(map(str, Path(source).parent.glob(Path(source).name)))
            if not files:
                raise DataError(missing_file(Path(source)))
            builder = _BUILDERS[Path(source).suffix]
            found = datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
    except DataError:
        raise
    except Exception as error:  # whatever hub, network and file formats have to say
        raise UserError(f"{source}: cannot be read: {str(error).splitlines()[0]}") from None
    for column, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
        elif isinstance(_inner(feature), datasets.Image):
            found = found.cast_column(column, datasets.Sequence(datasets.Image(decode=False)))
    return found


def _inner(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Sequence | datasets.List):
        return feature.feature
    return feature[0] if isinstance(feature, list) and feature else None


def _plain(row: Mapping[str, Any], number: str) -> dict[str, Any]:
    """Return a row with its pictures as `StoredPicture`, and with the names that webdataset shards have replaced."""
    made: dict[str, Any] = {}
    for key, value in row.items():
        if key == "json" and isinstance(value, Mapping):
            made.update(value)
        elif key == "__key__":
            made.setdefault("id", value)
        elif key in _TEXT_KEYS and isinstance(value, str):
            made.setdefault("caption", value)
        elif isinstance(value, list) and value and all(map(_is_picture, value)):
            made[key] = [_picture(item, f"{number}-{place}") for place, item in enumerate(value)]
        elif _is_picture(value):
            made["image" if key in ("jpg", "jpeg", "png", "webp") else key] = _picture(value, number)
        else:
            made[key] = value
    names = [name for name in COLUMNS["image"] if made.get(name) is not None]
    if names and names[0] != "image" and "images" not in made:
        made["image"] = made.pop(names[0])
    return made


def _is_picture(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"}


def _picture(value: Mapping[str, Any], number: str) -> str:
    if value["bytes"] is None:
        return str(value["path"])
    return StoredPicture(Path(value["path"] or number).name, value["bytes"])
