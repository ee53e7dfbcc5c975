"""Find duplicates: records, copies and near copies of pictures, and test data in the training data.

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

from milora_data.pictures.files import ImageError, StoredPicture, content_of, load_image, place_of
from milora_data.records.record import Record
from milora_vl.base.errors import UserError

Hashing = Literal["exact", "near"]
NEAR_BITS = 4
_BANDS = NEAR_BITS + 1  # if two hashes differ in at most 4 bits, at least one of 5 bands is equal


def duplicate_statistics(records: Sequence[Record], folder: Path, how: Hashing | None) -> dict[str, Any]:
    """Return the number of repeated records and, with `how`, of repeated pictures and the first cases."""
    result: dict[str, Any] = {"repeated_records": len(records) - len({_content(record) for record in records})}
    if how is not None:
        hashes = picture_hashes((name for record in records for name in record.images), folder, how)
        pairs = equal_pairs(hashes, hashes) if how == "exact" else near_pairs(hashes, hashes)
        result[f"{how}_copies_of_pictures"] = len({second for _, second in pairs})
        result["first_copies"] = [[f"{one} = {other}", 1] for one, other in pairs[:20]]
    return result


def _content(record: Record) -> bytes:
    """Return 16 bytes that differ for different pictures, videos, turns or tools; a million records need 100 MB."""
    calls = [turn.call for turn in record.turns]  # the repr of a turn leaves its call out
    parts = (record.images, record.videos, record.turns, calls, record.extra.get("tools"))
    digest = hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16)
    for picture in record.files:
        if isinstance(picture, StoredPicture):
            digest.update(picture.content)
    return digest.digest()


def leakage(
    train: Sequence[Record], test: Sequence[Record], folders: tuple[Path, Path], how: Hashing | None
) -> dict[str, Any]:
    """Return how many records of `test` share questions, picture names and, with `how`, pictures with `train`."""
    known = {(record.images, turn.text) for record in train for turn in record.turns if turn.role == "user"}
    asked = [
        any((record.images, turn.text) in known for turn in record.turns if turn.role == "user") for record in test
    ]
    names = dict.fromkeys(name for record in train for name in record.images)
    result: dict[str, Any] = {
        "test_records": len(test),
        "with_a_question_of_the_training": sum(asked),
        "with_a_picture_name_of_the_training": sum(any(name in names for name in record.images) for record in test),
    }
    if how is not None:
        train_hashes = picture_hashes(names, folders[0], how)
        test_hashes = picture_hashes((name for record in test for name in record.images), folders[1], how)
        pairs = equal_pairs(train_hashes, test_hashes) if how == "exact" else near_pairs(train_hashes, test_hashes)
        shared = {name for _, name in pairs}
        result["with_an_equal_picture_in_the_training" if how == "exact" else "with_a_near_picture_in_the_training"] = (
            sum(any(name in shared for name in record.images) for record in test)
        )
        result["first_shared"] = [[f"{one} = {other}", 1] for one, other in pairs[:20]]
    return result


def picture_hashes(names: Iterable[str], folder: Path, how: Hashing, *, threads: int = 8) -> dict[str, int]:
    """Return a hash of each readable picture; shows a progress bar on a terminal."""
    from tqdm import tqdm

    unique = list(dict.fromkeys(names))
    make = _content_hash if how == "exact" else _near_hash()
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(lambda name: make(place_of(folder, name)), unique)
        bar = tqdm(hashes, "pictures", len(unique), disable=None, file=sys.stderr, leave=False)
        return {name: value for name, value in zip(unique, bar, strict=True) if value is not None}


def equal_pairs(one: Mapping[str, int], other: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return (name in `one`, name in `other`) for each picture of `other` with an equal one in `one`.

    If both are the same set, each picture is paired with its first equal.
    """
    first: dict[int, str] = {}
    for name, value in one.items():
        first.setdefault(value, name)
    pairs = [(first[value], name) for name, value in other.items() if value in first]
    return [pair for pair in pairs if one is not other or pair[0] != pair[1]]


def near_pairs(one: Mapping[str, int], other: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return (name in `one`, name in `other`) for each picture of `other` with a near one in `one`.

    If both are the same set, each picture is paired with an earlier one.

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
        candidates = (candidate for band in _bands(value) for candidate in bands.get(band, ()))
        near = (
            candidate
            for candidate in candidates
            if (one is not other or place[candidate] < place[name])
            and (one[candidate] ^ value).bit_count() <= NEAR_BITS
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
        raise UserError(
            "near copies need the package imagehash, which is not installed",
            code="package-missing",
            hint='pip install "milora-vl[data]"',
        ) from None

    def make(path: str | Path) -> int | None:
        try:
            return int(str(imagehash.phash(load_image(path, longest=64))), 16)
        except ImageError:
            return None

    return make
