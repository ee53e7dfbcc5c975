"""Lengths of records in tokens, including those of images; counted once and cached beside the data."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.labels import NoSupervisedTokens
from milora_data.pictures.files import place_of
from milora_data.records.record import Record
from milora_vl.common.atomic_write import atomic_file

log = logging.getLogger(__name__)


def lengths_of(records: Sequence[Record], collate: RecordCollator[Any], *, beside: Path | None = None) -> list[int]:
    """Return the number of tokens of each record as `num_tokens`; shows a progress bar. One without answers counts 0.

    `beside` is the data file: the lengths are cached next to it (NAME.lengths-KEY.npy) and reused for the same records
    and settings; a read-only folder is not an error. Raises `DataError` like the collator.
    """
    cache = None if beside is None else beside.with_name(f"{beside.name}.lengths-{_key(records, collate)}.npy")
    if cache is not None and cache.is_file():
        lengths = np.load(cache)
    else:
        lengths = _counted(records, collate)
        if cache is not None:
            _save(cache, lengths)
    cut: list[int] = (lengths if collate.max_length is None else np.minimum(lengths, collate.max_length)).tolist()
    return cut


def _counted(records: Sequence[Record], collate: RecordCollator[Any]) -> np.ndarray:
    from tqdm import tqdm

    lengths = np.zeros(len(records), dtype=np.int64)
    bar = tqdm(records, "counting tokens", disable=None, file=sys.stderr, leave=False)
    for number, record in enumerate(bar):
        try:
            lengths[number] = collate.full_length(record)
        except NoSupervisedTokens:
            continue  # the collator skips it
    return lengths


def _key(records: Sequence[Record], collate: RecordCollator[Any]) -> str:
    """Return a hash of all that lengths depend on: settings, texts, and size and time of image files if they matter."""
    key = hashlib.blake2b(collate.length_settings().encode("utf-8", "surrogatepass"), digest_size=6)
    for record in records:
        parts = [str(len(record.images)), *map(repr, record.videos)]
        parts += (f"{turn.role}\1{turn.text}" + (f"\1{turn.call}" if turn.call else "") for turn in record.turns)
        if tools := record.extra.get("tools"):
            parts.append(f"tools\1{tools!r}")
        if collate.length_by_size:
            parts += (f"{name}\1{_state(place_of(collate.image_folder, name))}" for name in record.files)
        key.update("\0".join(parts).encode("utf-8", "surrogatepass"))
    return key.hexdigest()


def _state(file: str | Path) -> str:
    """Return size and modification time of a file; a stored image is identified by its name alone."""
    try:
        status = file.stat() if isinstance(file, Path) else None
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}" if status else ""


def _save(path: Path, lengths: np.ndarray) -> None:
    try:
        with atomic_file(path) as part, part.open("wb") as file:
            np.save(file, lengths)
    except OSError as error:
        log.info("the lengths are not cached: %s", error)
