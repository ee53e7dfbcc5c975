"""What occurs twice: records, pictures under several names, near copies of them, and a test set in the training.

Equal files are found by their content. Near copies (another size, format or quality) are found by the perceptual hash
of the library `imagehash`: two pictures are near if at most 4 of its 64 bits differ.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from milora_data.errors import UserError
from milora_data.images import ImageError, content_of, load_image, place_of
from milora_data.records import Record

Hashing = Literal["exact", "near"]
NEAR_BITS = 4
_BANDS = NEAR_BITS + 1  # of two hashes that differ in 4 bits, one of 5 bands is equal


def duplicate_statistics(records: Sequence[Record], folder: Path, how: Hashing | None) -> dict[str, Any]:
    """Return how many records are repeated, and of the pictures (where `how` is given) how many, with first cases."""
    found: dict[str, Any] = {"repeated_records": len(records) - len({(r.images, r.turns) for r in records})}
    if how is not None:
        hashes = picture_hashes((name for record in records for name in record.images), folder, how)
        pairs = equal_pairs(hashes, hashes) if how == "exact" else near_pairs(hashes, hashes)
        found[f"{how}_copies_of_pictures"] = len({second for _, second in pairs})
        found["first_copies"] = [[f"{one} = {other}", 1] for one, other in pairs[:20]]
    return found


def leakage(
    train: Sequence[Record], test: Sequence[Record], folders: tuple[Path, Path], how: Hashing | None
) -> dict[str, Any]:
    """Return how much of `test` is in `train`: questions, names of pictures, and pictures if `how` is given."""
    known = {(record.images, turn.text) for record in train for turn in record.turns if turn.role == "user"}
    asked = [
        any((record.images, turn.text) in known for turn in record.turns if turn.role == "user") for record in test
    ]
    names = dict.fromkeys(name for record in train for name in record.images)
    found: dict[str, Any] = {
        "test_records": len(test),
        "with_a_question_of_the_training": sum(asked),
        "with_a_picture_name_of_the_training": sum(any(name in names for name in record.images) for record in test),
    }
    if how is not None:
        ours = picture_hashes(names, folders[0], how)
        theirs = picture_hashes((name for record in test for name in record.images), folders[1], how)
        pairs = equal_pairs(ours, theirs) if how == "exact" else near_pairs(ours, theirs)
        shared = {name for _, name in pairs}
        found["with_an_equal_picture_in_the_training" if how == "exact" else "with_a_near_picture_in_the_training"] = (
            sum(any(name in shared for name in record.images) for record in test)
        )
        found["first_shared"] = [[f"{one} = {other}", 1] for one, other in pairs[:20]]
    return found


def picture_hashes(names: Iterable[str], folder: Path, how: Hashing, *, threads: int = 8) -> dict[str, int]:
    """Return a hash of each picture that can be read; a bar shows on a terminal how far it is."""
    from tqdm import tqdm

    unique = list(dict.fromkeys(names))
    make = _content_hash if how == "exact" else _near_hash()
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(lambda name: make(place_of(folder, name)), unique)
        bar = tqdm(hashes, "pictures", len(unique), disable=None, file=sys.stderr, leave=False)
        return {name: value for name, value in zip(unique, bar, strict=True) if value is not None}


def equal_pairs(one: Mapping[str, int], other: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return (name in `one`, name in `other`) for each of `other` that has an equal; within one set, its first."""
    first: dict[int, str] = {}
    for name, value in one.items():
        first.setdefault(value, name)
    pairs = [(first[value], name) for name, value in other.items() if value in first]
    return [pair for pair in pairs if one is not other or pair[0] != pair[1]]


def near_pairs(one: Mapping[str, int], other: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return (name in `one`, name in `other`) for each of `other` that has a near one before it, or in another set.

    >>> near_pairs({"a": 0b1011, "b": 0xFF00}, {"c": 0b1000})
    [('a', 'c')]
    """
    bands: dict[tuple[int, int], list[str]] = {}
    place = {name: number for number, name in enumerate(one)}
    for name, value in one.items():
        for band in _bands(value):
            bands.setdefault(band, []).append(name)
    pairs = []
    for name, value in other.items():
        candidates = (found for band in _bands(value) for found in bands.get(band, ()))
        near = (
            found
            for found in candidates
            if (one is not other or place[found] < place[name]) and (one[found] ^ value).bit_count() <= NEAR_BITS
        )
        first = next(near, None)
        if first is not None:
            pairs.append((first, name))
    return pairs


def _bands(value: int) -> list[tuple[int, int]]:
    width = -(-64 // _BANDS)
    return [(number, value >> (number * width) & ((1 << width) - 1)) for number in range(_BANDS)]


def _content_hash(path: str | Path) -> int | None:
    try:
        return int.from_bytes(hashlib.blake2b(content_of(path), digest_size=8).digest(), "big")
    except OSError:
        return None


def _near_hash() -> Any:
    try:
        import imagehash
    except ImportError:
        raise UserError('near copies are found with the library imagehash: pip install "milora-vl[data]"') from None

    def make(path: str | Path) -> int | None:
        try:
            return int(str(imagehash.phash(load_image(path, longest=64))), 16)
        except ImageError:
            return None

    return make
