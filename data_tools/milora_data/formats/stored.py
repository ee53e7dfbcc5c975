"""Read records from parquet and arrow files, webdataset shards and hub data sets, row by row with `datasets`.

Pictures are not decoded: each is a `Picture` with the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import missing_file
from milora_data.formats.tables import COLUMNS, TableOptions, is_record, row_record
from milora_data.pictures.load import Picture
from milora_data.records import parse_record
from milora_data.records.record import Record
from milora_vl.common.cli.web import hub_is_known
from milora_vl.common.errors import DataError, UserError, first_line, with_context

HUB = "hub:"
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
_TEXT_KEYS = ("txt", "caption", "cls")  # webdataset's names for the text that belongs to a picture


def is_stored(source: str | Path) -> bool:
    """Return whether `datasets` reads the source: from the hub, a file of its formats, or a folder that it saved."""
    return str(source).startswith(HUB) or Path(source).suffix in _BUILDERS or is_saved(source)


def stored_items(source: str, options: TableOptions | None = None) -> Iterator[Record | DataError]:
    """Yield the records of a source, and a `DataError` with its number in place of each row that is not a record.

    A source is FILE.parquet, FILE.tar (or a pattern with *), a folder of `save_to_disk`, or a hub data set. Its rows
    are LLaVA records, `messages`, or have columns for picture, question and answer, or for picture and caption.
    """
    if source.startswith(HUB):
        number = -1
        try:
            for number, row in enumerate(open_hub(source)):
                if options is None or options.wants(row):
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


def items_of_file(file: str, options: TableOptions | None = None, *, start: int = 0) -> Iterator[Record | DataError]:
    """Yield the records of one file; `start` is the number, and the default id, of the first one.

    If the file is broken at a row, the last item is a `DataError` with that row, as later rows cannot be read.
    """
    number = -1
    try:
        # Iterating the data set itself would split the rows among the loader processes a second time; `iter` does not.
        for number, batch in enumerate(_open_file(file).iter(batch_size=1)):
            row = {key: values[0] for key, values in batch.items()}
            if options is None or options.wants(row):
                yield _item(row, f"{file}:{number}", str(start + number), options)
    except Exception as error:  # readers of file formats raise exceptions of any type
        yield broken_off(f"{file}:{number + 1}", error)


def broken_off(place: str, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return with_context(error, place)
    message = f"cannot be read from here on: {first_line(error)}"
    return DataError(message, where=place, hint="download or copy the file again")


def _item(row: Mapping[str, Any], place: str, number: str, options: TableOptions | None) -> Record | DataError:
    try:
        return row_to_record(row, place, number, options)
    except DataError as error:
        return error


def row_to_record(row: Mapping[str, Any], place: str, number: str, options: TableOptions | None = None) -> Record:
    """Return the record of one row; `number` is the default id. Raises `DataError` if it is not a record."""
    plain = {key: value for key, value in _plain(row, number).items() if value is not None}
    if is_record(plain):
        return parse_record(plain, source=place)
    return parse_record(row_record(plain, options or TableOptions(), place=place, identifier=number), source=place)


def is_saved(path: str | Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote the folder `path`: one split, or several splits in folders."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _files_of_saved(folder: Path) -> list[str]:
    """Return the files with the rows of a split, in order. Raises `DataError` if there are several splits."""
    splits = [file.parent for file in sorted(folder.glob("*/state.json"))]
    if len(splits) > 1:
        raise DataError(
            f"this folder contains {len(splits)} splits",
            code="data-several-splits",
            where=str(folder),
            hint=f"name one: {' or '.join(map(str, splits))}",
        )
    return sorted(map(str, (splits[0] if splits else folder).glob("*.arrow")))


def files_of(source: str) -> list[str]:
    """Return the files of a name, a pattern with *, or a `save_to_disk` folder. Raises `DataError` without any."""
    path = Path(source)
    files = _files_of_saved(path) if is_saved(path) else sorted(map(str, path.parent.glob(path.name)))
    if not files:
        raise missing_file(path)
    return files


def open_hub(source: str) -> Any:
    """Return hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT] as a `datasets.IterableDataset`, pictures not decoded.

    Raises `UserError`.
    """
    import datasets

    name, _, split = source.removeprefix(HUB).partition(":")
    name, _, revision = name.partition("@")
    config = None
    if not Path(name).is_dir() and (name.count("/") == 2 or Path(name).parent.is_dir()):
        name, _, config = name.rpartition("/")
    is_here = Path(name).is_dir() or datasets.config.HF_DATASETS_OFFLINE
    try:
        if not is_here and not hub_is_known():  # the client would retry for half a minute
            raise ConnectionError("the hub does not answer: its host is not known here")
        opened = datasets.load_dataset(name, config, split=split or "train", revision=revision or None, streaming=True)
        return _undecoded(opened)
    except Exception as error:  # hub, network and readers of file formats raise exceptions of any type
        hint, reason = "check the name and the network; for a private data set:  hf auth login", first_line(error)
        if "onfig" in reason:  # the next line lists the configurations
            hint, reason = f"name one:  {HUB}{name}/CONFIG", " ".join(str(error).splitlines()[:2])
        raise UserError(f"cannot be read: {reason}", code="hub-unreadable", where=source, hint=hint) from None


def _open_file(file: str) -> Any:
    import datasets

    if (builder := _BUILDERS.get(Path(file).suffix)) is None:
        raise DataError(f"expected one of {', '.join(_BUILDERS)}")
    return _undecoded(datasets.load_dataset(builder, data_files=[file], split="train", streaming=True))


def _undecoded(data_set: Any) -> Any:
    """Return a data set with the bytes of its pictures, and with the names of its classes in place of numbers."""
    import datasets

    classes = {}
    for column, feature in (data_set.features or {}).items():
        if isinstance(feature, datasets.Image):
            data_set = data_set.cast_column(column, datasets.Image(decode=False))
        elif isinstance(_inner(feature), datasets.Image):
            data_set = data_set.cast_column(column, datasets.Sequence(datasets.Image(decode=False)))
        elif isinstance(feature, datasets.ClassLabel):
            classes[column] = feature.names
    if not classes:
        return data_set
    features = data_set.features.copy()
    features.update({column: datasets.Value("string") for column in classes})
    return data_set.map(_named, fn_kwargs={"classes": classes}, features=features)


def _named(row: Mapping[str, Any], classes: Mapping[str, list[str]]) -> dict[str, str | None]:
    """Return the names of the classes of a row; -1 means none, as in `datasets`."""
    numbers = {column: row[column] for column in classes}
    return {column: None if n in (None, -1) else classes[column][n] for column, n in numbers.items()}


def _inner(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Sequence | datasets.List):
        return feature.feature
    return feature[0] if isinstance(feature, list) and feature else None


def _plain(row: Mapping[str, Any], number: str) -> dict[str, Any]:
    """Return a row with pictures as `Picture`, and with webdataset's column names replaced by ours."""
    plain: dict[str, Any] = {}
    for key, value in row.items():
        if key == "json" and isinstance(value, Mapping):
            plain.update(value)
        elif key == "__key__":
            plain.setdefault("id", value)
        elif key in _TEXT_KEYS and isinstance(value, str):
            plain.setdefault("caption", value)
        elif isinstance(value, list) and value and all(map(_is_picture, value)):
            plain[key] = [_picture(item, f"{number}-{index}") for index, item in enumerate(value)]
        elif _is_picture(value):
            plain["image" if key in ("jpg", "jpeg", "png", "webp") else key] = _picture(value, number)
        else:
            plain[key] = value
    names = [name for name in COLUMNS["image"] if plain.get(name) is not None]
    if names and names[0] != "image" and "images" not in plain:
        plain["image"] = plain.pop(names[0])
    return plain


def _is_picture(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"}


def _picture(value: Mapping[str, Any], number: str) -> str | Picture:
    if value["bytes"] is None:
        return str(value["path"])
    return Picture(Path(value["path"] or number).name or number, content=value["bytes"])
