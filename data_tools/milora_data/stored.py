"""Records from parquet files, webdataset shards and sets of the hub, read row by row with `datasets`.

Pictures are not decoded here: they come as `StoredPicture`, a name with the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from milora_data.errors import DataError, UserError
from milora_data.images import StoredPicture
from milora_data.jsonfile import missing_file
from milora_data.other_files import COLUMNS, row_record
from milora_data.records import Record, parse_record
from milora_data.vqa_files import Options

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
    if source.startswith(HUB):
        number = -1
        try:
            for number, row in enumerate(open_hub(source)):
                yield _item(row, f"{source}:{number}", str(number), options)
        except UserError:
            raise
        except Exception as error:
            yield broken_off(f"{source}:{number + 1}", error)
        return
    total = 0
    for file in files_of(source):
        for item in items_of_file(file, options, start=total):
            yield item
            total += 1


def items_of_file(file: str, options: Options | None = None, *, start: int = 0) -> Iterator[Record | DataError]:
    """Yield the records of one file (start: the number of the first one, its id unless it has one).

    Behind a break nothing is known: the last item is then a `DataError` that says where it is.
    """
    number = -1
    try:
        # `iter`, as the other way a loader process would share out the rows of the file once more.
        for number, batch in enumerate(_open_file(file).iter(batch_size=1)):
            row = {key: values[0] for key, values in batch.items()}
            yield _item(row, f"{file}:{number}", str(start + number), options)
    except Exception as error:  # whatever the readers of file formats trip over
        yield broken_off(f"{file}:{number + 1}", error)


def broken_off(place: str, error: Exception) -> DataError:
    """Return what is said of a source that a reader of `datasets` does not come through."""
    words = str(error).splitlines() or [type(error).__name__]
    return DataError(f"{place}: cannot be read from here on: {words[0]}")


def _item(row: Mapping[str, Any], place: str, number: str, options: Options | None) -> Record | DataError:
    try:
        return row_to_record(row, place, number, options)
    except DataError as error:
        return error


def row_to_record(row: Mapping[str, Any], place: str, number: str, options: Options | None = None) -> Record:
    """Return the record of one row; `number` is its id unless it has one. Raises `DataError`."""
    plain = {key: value for key, value in _plain(row, number).items() if value is not None}
    if "conversations" in plain or "messages" in plain:
        return parse_record(plain, source=place)
    return parse_record(row_record(plain, options or Options(), place=place, identifier=number), source=place)


def files_of(source: str) -> list[str]:
    """Return the files that a name, or a pattern with *, stands for. Raises `DataError` if there is none."""
    files = sorted(map(str, Path(source).parent.glob(Path(source).name)))
    if not files:
        raise DataError(missing_file(Path(source)))
    return files


def open_hub(source: str) -> Any:
    """Return hub:OWNER/NAME[:SPLIT] as a `datasets.IterableDataset`, pictures not decoded. Raises `UserError`."""
    import datasets

    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        return _undecoded(datasets.load_dataset(name, split=split or "train", streaming=True))
    except Exception as error:  # whatever hub, network and file formats have to say
        words = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{source}: cannot be read: {words[0]}") from None


def _open_file(file: str) -> Any:
    import datasets

    if (builder := _BUILDERS.get(Path(file).suffix)) is None:
        raise DataError(f"expected one of {', '.join(_BUILDERS)}")
    return _undecoded(datasets.load_dataset(builder, data_files=[file], split="train", streaming=True))


def _undecoded(found: Any) -> Any:
    """Return a set whose pictures are left as they are stored."""
    import datasets

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
    return StoredPicture(Path(value["path"] or number).name or number, value["bytes"])
