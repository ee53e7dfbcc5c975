"""Content keys: the identity of a picture, record, question or data set. Joins, caches and comparisons use them alone.

Names and places are for people to read. The key of a model is `weights_digest` (milora_vl/core/weights).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import xxhash

from milora_data.pictures.load import Picture, PictureFile, opened
from milora_data.records.record import IMAGE, Record, Turn, Video

KeyOf = Callable[[Picture], str | None]
"""Returns the key of a picture or video of a record; None without a file."""


def digest(value: object) -> str:
    """Return a hash of a value of lists, mappings, texts and numbers; the order of a mapping does not change it.

    It protects against accidents, not against attacks.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": (2,), "a": 1})
    True
    """
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def file_key(path: PictureFile) -> str | None:
    """Return the key of a picture or video: a hash of its bytes; None for a file that is missing or may not be read."""
    total = xxhash.xxh3_128()
    try:
        source = opened(path)
        with source if isinstance(source, BytesIO) else Path(source).open("rb") as file:
            while chunk := file.read(1 << 22):
                total.update(chunk)
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return None
    return total.hexdigest()


class FileKeys:
    """Returns the key of each picture or video of a record, and reads each file once; without folders, names are paths.

    A name is looked for in each folder. Where there is no readable file, its path below the first folder is the key,
    and `missing` has it.
    """

    def __init__(self, *folders: str | Path) -> None:
        self._folders = [Path(folder) for folder in folders] or [Path()]
        self._keys: dict[Picture, str] = {}
        self.missing: set[Picture] = set()

    def __call__(self, picture: Picture) -> str:
        if picture.content is not None:
            return str(file_key(picture))  # `_keys` would keep its bytes
        if picture not in self._keys:
            found = next(filter(None, (file_key(picture.within(folder)) for folder in self._folders)), None)
            if found is None:
                self.missing.add(picture)
                found = f"no file {os.path.relpath(self._folders[0] / str(picture), self._folders[0])}"
            self._keys[picture] = found
        return self._keys[picture]


def shown_keys(images: Sequence[Picture], videos: Sequence[Video], key_of: KeyOf) -> list[object]:
    """Return what identifies pictures and videos: the key of each file, and how a video is sampled."""
    return [*map(key_of, images), *([*map(key_of, video.files), video.fps, video.num_frames] for video in videos)]


def record_key(record: Record, key_of: KeyOf) -> str:
    """Return the key of the turns of a record, with its pictures; its id and its place do not count."""
    return digest([_texts(record.turns), shown_keys(record.images, record.videos, key_of)])


def answered(record: Record, key_of: KeyOf) -> Iterator[tuple[str, str]]:
    """Yield the key of each question whose answer is trained, with all that comes before it, and the answer."""
    shown, before = shown_keys(record.images, record.videos, key_of), list[str]()
    for turn in record.turns:
        if turn.role == "assistant" and turn.weight and before:
            yield digest([before, shown]), turn.text.strip()
        before.append(turn.text.replace(IMAGE, "").strip())


def question_key(turns: Sequence[Turn], shown: Sequence[object], answers: Sequence[str], metric: object) -> str:
    """Return the key of a question: its prompt, what it shows (`shown_keys`), its references and its metric."""
    return digest([_texts(turns), shown, answers, metric])


def data_key(keys: Iterable[str]) -> str:
    """Return the key of a data set from the keys of its records, in their order."""
    return digest(list(keys))


def _texts(turns: Sequence[Turn]) -> list[tuple[str, str, int, str]]:
    return [(turn.role, turn.text, turn.weight, turn.keys) for turn in turns]
