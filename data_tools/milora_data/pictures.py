"""Which pictures of a data set are missing, and which cannot be read."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import DataError
from .images import ImageError, load_image
from .records import Record


class MissingImages(DataError):
    """Pictures that records name and that are not there; says how many, the first few, and what to do."""

    def __init__(self, missing: Sequence[str], total: int, folder: Path, elsewhere: Path | None) -> None:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        where = f"in {folder}" if str(folder) != "." else "here (no --image_folder is given)"
        lines = [f"{len(missing):,} of {total:,} pictures are missing {where}", f"first: {first}"]
        if elsewhere is not None:
            lines.append(f"there are such files below: --image_folder {elsewhere}")
        lines.append("leave their records out: --bad_images skip; show a plain picture instead: --bad_images replace")
        super().__init__("\n".join(lines))


def uses(records: Iterable[Record]) -> dict[str, list[str]]:
    """Return, by picture name in the order of first use, the sources of the records that name it."""
    found: dict[str, list[str]] = {}
    for record in records:
        for name in record.images:
            found.setdefault(name, []).append(record.source)
    return found


def find_missing(names: Iterable[str], folder: Path) -> list[str]:
    """Return the names for which there is no file below `folder`."""
    return [name for name in names if not (folder / name).is_file()]


def find_corrupt(names: Sequence[str], folder: Path, *, threads: int = 8) -> Mapping[str, str]:
    """Return, by name, what is wrong with each picture that cannot be decoded; a progress bar shows on a terminal."""
    from tqdm import tqdm

    def reason(name: str) -> str | None:
        try:
            load_image(folder / name)
        except ImageError as error:
            return str(error).split("cannot read this picture: ", 1)[-1]
        return None

    with ThreadPoolExecutor(threads) as pool:
        reasons = tqdm(pool.map(reason, names), "pictures", len(names), disable=None, file=sys.stderr, leave=False)
        return {name: text for name, text in zip(names, reasons, strict=True) if text is not None}


def elsewhere(missing: Sequence[str], folder: Path, beside: Path | None) -> Path | None:
    """Return the folder below which the first missing pictures do lie: a neighbour of `folder`, or the data's own."""
    candidates = [folder.parent, *([beside, beside / "images"] if beside else []), folder / "images"]
    near = (place for place in candidates if place != folder)
    return next((place for place in near if missing and any((place / name).is_file() for name in missing[:5])), None)
