"""Several sources as one: each with a weight, which says how often its records come in an epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milora_data.errors import DataError, UserError
from milora_data.images import PlacedPicture, StoredPicture, leads_outside
from milora_data.records import Record, load_records

_KEYS = ("path", "weight", "image_folder")


@dataclass(frozen=True, slots=True)
class Source:
    """One source of a mixture: with weight 2 its records come twice, with 0.3 a random 30 % of them come."""

    path: str
    weight: float = 1.0
    image_folder: str | None = None


def read_sources(path: Path) -> tuple[list[Source], int]:
    """Return the sources and the seed of a YAML file: `sources: [{path, weight, image_folder}]`, `seed`.

    Paths are relative to the file. Raises `DataError`: no such file, broken YAML, unknown keys, a weight below 0.
    """
    import yaml

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: broken YAML: {error}") from None
    seed = content.get("seed", 0) if isinstance(content, Mapping) else 0
    entries = content.get("sources") if isinstance(content, Mapping) else content
    if not isinstance(entries, list) or not entries or not isinstance(seed, int):
        raise DataError(f"{path}: expected `sources:`, a list of {{path: ..., weight: ..., image_folder: ...}}")
    return [_source(entry, path.parent, f"{path}: source {number}") for number, entry in enumerate(entries, 1)], seed


def mixed_records(
    sources: Sequence[Source], seed: int = 0, read: Callable[[str], Iterator[Record]] = load_records
) -> Iterator[Record]:
    """Yield the records of all sources, one source after the other, each as often as its weight says.

    Names of pictures are joined to the image folder of their source. Raises what `read` raises.
    """
    for number, source in enumerate(sources):
        chance = random.Random(f"{seed} {number}")
        times, share = divmod(source.weight, 1)
        for record in read(source.path):
            copies = int(times) + (chance.random() < share)
            if copies:
                record = within(record, source.image_folder)
            for _ in range(copies):
                yield record


def within(record: Record, image_folder: str | None) -> Record:
    """Return a record whose pictures are named from anywhere: below the image folder of its source, if it has one.

    A name that leads out of that folder stays as it is, and counts for the image folder of the training.
    """
    if image_folder is None:
        return record
    folder = Path(image_folder)

    def placed(name: str) -> str:
        if isinstance(name, StoredPicture) or leads_outside(folder, name):
            return name
        return PlacedPicture((folder / name).absolute())

    return replace(record, images=tuple(map(placed, record.images)))


def _source(entry: Any, folder: Path, place: str) -> Source:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise DataError(f"{place}: expected {{path: ..., weight: ..., image_folder: ...}}, got {entry!r}")
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise UserError(f"{place}: unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise DataError(f"{place}: weight must be a number from 0 up, got {weight!r}")
    path, images = entry["path"], entry.get("image_folder")
    return Source(
        path if path.startswith("hub:") else str(folder / path),
        float(weight),
        None if images is None else str(folder / images),
    )
