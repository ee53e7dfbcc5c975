"""True lengths of records, in tokens with those of pictures: counted once, and kept beside the data."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora_data.anyres import Tiling
from milora_data.encode import NothingToLearn, encode
from milora_data.images import ImageError, picture_size, place_of
from milora_data.records import Record
from milora_data.tokens import fast_backend

log = logging.getLogger(__name__)


def encoded_lengths(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    template: str,
    image_tokens: int,
    max_length: int | None = None,
    beside: Path | None = None,
    tiling: Tiling | None = None,
    image_folder: str | Path | None = None,
) -> list[int]:
    """Return the number of tokens of each record, at most `max_length`; a bar shows how far it is.

    `beside` is the data file: the lengths are kept next to it (NAME.lengths-KEY.npy) and used again for the same
    records, tokenizer and template. A folder that cannot be written to is no error. Raises `DataError` like `encode`.
    With `tiling`, a picture takes as many tokens as its size below `image_folder` asks for.
    """
    folder = Path(image_folder or "")
    key = _key(records, tokenizer, template, tiling, folder)
    cache = None if beside is None else beside.with_name(f"{beside.name}.lengths-{key}.npy")
    if cache is not None and cache.is_file():
        texts, pictures = np.load(cache)
    else:
        texts, pictures = _counted(records, tokenizer, template, tiling, folder)
        if cache is not None:
            _keep(cache, np.stack([texts, pictures]))
    lengths = texts + (pictures if tiling else image_tokens * pictures)
    return list(map(int, lengths if max_length is None else np.minimum(lengths, max_length)))


def _counted(
    records: Sequence[Record], tokenizer: Any, template: str, tiling: Tiling | None, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of texts, and the number of pictures or, where they are tiled, that of their tokens."""
    from tqdm import tqdm

    counts = np.zeros((2, len(records)), dtype=np.int64)
    bar = tqdm(records, "counting tokens", disable=None, file=sys.stderr, leave=False)
    for number, record in enumerate(bar):
        try:
            made = encode(record, tokenizer, template=template, image_token_id=-1, image_tokens=0)
        except NothingToLearn:
            continue  # the collator leaves it out
        counts[0, number] = len(made.input_ids)
        counts[1, number] = sum(
            _num_tokens(place_of(folder, name), tiling) for name in record.images[: made.num_images]
        )
    return counts[0], counts[1]


def _num_tokens(picture: str | Path, tiling: Tiling | None) -> int:
    if tiling is None:
        return 1
    try:
        return tiling.num_tokens(*picture_size(picture))
    except ImageError:  # the collator leaves it out, or shows a plain one
        return tiling.num_tokens(1, 1)


def _key(records: Sequence[Record], tokenizer: Any, template: str, tiling: Tiling | None, folder: Path) -> str:
    """What lengths depend on, as a hash: where pictures are tiled, also on which files they are, by size and time."""
    found = hashlib.blake2b(f"{tiling}\0".encode() if tiling else b"", digest_size=6)
    found.update(f"{template}\0{fast_backend(tokenizer).to_str()}\0{tokenizer.eos_token}\0".encode())
    for record in records:
        text = "\0".join([str(len(record.images)), *(f"{turn.role}\1{turn.text}" for turn in record.turns)])
        found.update(text.encode("utf-8", "surrogatepass"))
        if tiling is not None:
            states = (f"{name}\1{_state(place_of(folder, name))}" for name in record.images)
            found.update("\0".join(states).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _state(picture: str | Path) -> str:
    """Of a file its size and time of change; of a stored picture, whose place says which it is, nothing."""
    try:
        found = picture.stat() if isinstance(picture, Path) else None
    except OSError:
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns}" if found else ""


def _keep(path: Path, counts: np.ndarray) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            np.save(file, counts)
        part.replace(path)
    except OSError as error:
        log.info("lengths are not kept: %s", error)
