"""Find the pictures of a data set that are missing, unreadable or unusual."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.pictures.embedded import NOT_FETCHED, described
from milora_data.pictures.files import (
    ORIENTATION,
    ImageError,
    OutsidePicture,
    StoredPicture,
    WebPicture,
    load_image,
    opened_picture,
    place_of,
)
from milora_data.records.record import Record
from milora_vl.base.errors import DataError
from milora_vl.cli.web import web_address

if TYPE_CHECKING:
    from PIL import Image


class MissingImages(DataError):
    """Records name pictures that are missing or empty; the message has their number and the first few.

    The place names the first record with such a picture.

    `used` is the result of `uses` for all pictures.
    """

    def __init__(
        self, missing: Sequence[str], used: Mapping[str, Sequence[str]], folder: Path, elsewhere: Path | None
    ) -> None:
        shown = [described(name) if web_address(name) else name for name in missing[:5]]
        place = f"in {folder}" if str(folder) != "." else "in the current folder"
        empty = sum(is_empty(place_of(folder, name)) for name in missing)
        state = "missing or empty" if empty else "missing"
        files = dict.fromkeys(source.rpartition(":")[0] for name in missing for source in used[name])
        more = ", ..." if len(missing) > 5 else ""
        message = f"{len(missing):,} of {len(used):,} pictures are {state} {place}: {', '.join(shown)}{more}"
        hints = []
        if len(files) > 1:
            hints.append(f"records of {len(files):,} files name them: {', '.join(list(files)[:3])}")
        if str(folder) == ".":
            hints.append("name their folder:  --image_folder FOLDER")
        if empty:
            hints.append(f"{empty:,} are empty files (0 bytes): copy or download them again")
        if elsewhere is not None:
            hints.append(f"files with these names exist in another folder: --image_folder {elsewhere}")
        addresses = sum(web_address(name) is not None for name in missing)
        if addresses:
            hints.append(f"{addresses:,} at a web address: {NOT_FETCHED}")
        outside = sum(isinstance(place_of(folder, name), OutsidePicture) for name in missing)
        if outside:
            hints.append(f"{outside:,} lead out of that folder and are never read; absolute paths: --image_folder /")
        hints.append("skip their records: --bad_images skip; show a plain picture instead: --bad_images replace")
        super().__init__(message, code="data-missing-pictures", where=used[missing[0]][0], hint="\n".join(hints))


def uses(records: Iterable[Record]) -> dict[str, list[str]]:
    """Return, for each picture name in the order of first use, the first record of each file that names it."""
    sources: dict[str, list[str]] = {}
    for record in records:
        for name in record.files:
            add_use(sources, name, record.source)
    return sources


def add_use(sources: dict[str, list[str]], name: str, source: str) -> None:
    """Add to `sources` that the record at `source` names a picture: one record per file, in little memory."""
    known = sources.setdefault(name, [])
    if not known or known[-1].rpartition(":")[0] != source.rpartition(":")[0]:
        known.append(source)


def find_missing(names: Iterable[str], folder: Path) -> list[str]:
    """Return the names whose file below `folder` is missing or empty."""
    return [name for name in names if not _num_bytes(place_of(folder, name))]


def is_empty(path: str | Path) -> bool:
    """Return whether a picture exists and has no content."""
    return _num_bytes(path) == 0


def _num_bytes(path: str | Path) -> int | None:
    """Return the size of a picture file, or of a stored picture, in bytes; None if there is no file."""
    if isinstance(path, StoredPicture):
        return len(path.content)
    if isinstance(path, WebPicture):
        return 1  # it is downloaded when a record needs it
    try:
        status = path.stat() if isinstance(path, Path) else None
    except (OSError, ValueError):  # for example, a name that is too long for the file system
        return None
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None


def find_faults(names: Sequence[str], folder: Path, *, threads: int = 8) -> Iterator[tuple[str, str, str]]:
    """Yield (name, kind of finding, details) for each picture after decoding it; shows a progress bar on a terminal."""
    from tqdm import tqdm

    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda name: list(faults(place_of(folder, name))), names)
        bar = tqdm(results, "pictures", len(names), disable=None, leave=False)
        for name, findings in zip(names, bar, strict=True):
            for kind, message in findings:
                yield name, kind, message


def faults(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (kind of finding, details) for one picture file, which is decoded as in training."""
    try:
        with opened_picture(path) as image:
            notes = list(_peculiarities(image))
        load_image(path)
    except ImageError as error:
        yield "corrupt_picture", _details(error)
        return
    except Exception:  # PIL's plugins raise exceptions of any type; load_image converts them
        try:
            load_image(path)
        except ImageError as error:
            yield "corrupt_picture", _details(error)
        return
    yield from notes


def _details(error: ImageError) -> str:
    return "\n".join(filter(None, (error.reason, error.first.hint)))


def _peculiarities(image: Image.Image) -> Iterator[tuple[str, str]]:
    width, height = image.size
    if image.getexif().get(ORIENTATION, 1) not in (0, 1):
        yield "rotated_picture", f"EXIF orientation {image.getexif()[ORIENTATION]}"
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        yield "transparent_picture", f"mode {image.mode}"
    if max(width, height) > 10 * min(width, height):
        yield "long_picture", f"{width:,} x {height:,}"
    if image.format != "MPO":
        with suppress(EOFError):
            image.seek(1)
            yield "animated_picture", str(image.format)


def elsewhere(missing: Sequence[str], folder: Path, beside: Path | None) -> Path | None:
    """Return a folder near `folder` or beside the data that contains one of the first missing pictures, or None."""
    candidates = [folder.parent, *([beside, beside / "images"] if beside else []), folder / "images"]
    near = (place for place in candidates if place != folder)
    return next((place for place in near if any(_num_bytes(place_of(place, name)) for name in missing[:5])), None)
