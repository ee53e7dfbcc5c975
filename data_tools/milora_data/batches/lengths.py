"""Lengths of records in tokens, including picture tokens; counted once and cached beside the data."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora_data.encode.labels import NoSupervisedTokens, encode
from milora_data.encode.templates import OWN, template_name
from milora_data.encode.tokens import fast_backend, own_template
from milora_data.pictures.anyres import Tiling
from milora_data.pictures.files import ImageError, picture_size, place_of
from milora_data.records.record import Record
from milora_vl.common.atomic_write import atomic_file

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
    """Return the number of tokens of each record, at most `max_length`; shows a progress bar.

    `beside` is the data file: the lengths are cached next to it (NAME.lengths-KEY.npy) and reused for the same records,
    tokenizer and template; a read-only folder is not an error. With `tiling`, the number of tokens of a picture
    depends on the size of its file below `image_folder`. Raises `DataError` like `encode`.
    """
    folder = Path(image_folder or "")
    key = _key(records, tokenizer, template, tiling, folder)
    cache = None if beside is None else beside.with_name(f"{beside.name}.lengths-{key}.npy")
    if cache is not None and cache.is_file():
        texts, pictures = np.load(cache)
    else:
        texts, pictures = _counted(records, tokenizer, template, tiling, folder)
        if cache is not None:
            _save(cache, np.stack([texts, pictures]))
    lengths = texts + (pictures if tiling else image_tokens * pictures)
    cut: list[int] = (lengths if max_length is None else np.minimum(lengths, max_length)).tolist()
    return cut


def _counted(
    records: Sequence[Record], tokenizer: Any, template: str, tiling: Tiling | None, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return per record the number of text tokens, and the number of pictures or, with `tiling`, of picture tokens."""
    from tqdm import tqdm

    counts = np.zeros((2, len(records)), dtype=np.int64)
    bar = tqdm(records, "counting tokens", disable=None, file=sys.stderr, leave=False)
    for number, record in enumerate(bar):
        try:
            encoded = encode(record, tokenizer, template=template, image_token_id=-1, image_tokens=0)
        except NoSupervisedTokens:
            continue  # the collator skips it
        counts[0, number] = len(encoded.input_ids)
        counts[1, number] = encoded.num_images
        if tiling is not None:
            pictures = record.images[: encoded.num_images]
            counts[1, number] = sum(_num_tokens(place_of(folder, name), tiling) for name in pictures)
    return counts[0], counts[1]


def _num_tokens(picture: str | Path, tiling: Tiling) -> int:
    try:
        return tiling.num_tokens(*picture_size(picture))
    except ImageError:  # the collator skips the record, or replaces the picture by a plain one
        return tiling.num_tokens(1, 1)


def _key(records: Sequence[Record], tokenizer: Any, template: str, tiling: Tiling | None, folder: Path) -> str:
    """Return a hash of everything that lengths depend on; with `tiling`, also of the size and time of picture files."""
    key = hashlib.blake2b(f"{tiling}\0".encode() if tiling else b"", digest_size=6)
    if template_name(template) == OWN:
        key.update(own_template(tokenizer).encode())
    key.update(f"{template}\0{fast_backend(tokenizer).to_str()}\0{tokenizer.eos_token}\0".encode())
    for record in records:
        parts = [str(len(record.images))]
        parts += (f"{turn.role}\1{turn.text}" + (f"\1{turn.call}" if turn.call else "") for turn in record.turns)
        if tools := record.extra.get("tools"):
            parts.append(f"tools\1{tools!r}")
        key.update("\0".join(parts).encode("utf-8", "surrogatepass"))
        if tiling is not None:
            states = (f"{name}\1{_state(place_of(folder, name))}" for name in record.images)
            key.update("\0".join(states).encode("utf-8", "surrogatepass"))
    return key.hexdigest()


def _state(picture: str | Path) -> str:
    """Return size and modification time of a file; a stored picture is identified by its name alone."""
    try:
        status = picture.stat() if isinstance(picture, Path) else None
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}" if status else ""


def _save(path: Path, counts: np.ndarray) -> None:
    try:
        with atomic_file(path) as part, part.open("wb") as file:
            np.save(file, counts)
    except OSError as error:
        log.info("the lengths are not cached: %s", error)
