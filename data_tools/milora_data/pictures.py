"""Which pictures of a data set are missing, which cannot be read, and what is peculiar about others."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .embedded import NOT_FETCHED, described, is_web_address
from .errors import DataError
from .images import ORIENTATION, SUFFIXES, ImageError, OutsidePicture, StoredPicture, load_image, opened, place_of
from .records import Record

if TYPE_CHECKING:
    from PIL import Image


class MissingImages(DataError):
    """Pictures that records name and that are not there, or empty: how many, the first few, and what to do.

    `used` is what `uses` returns, of the missing pictures and of all others.
    """

    def __init__(
        self, missing: Sequence[str], used: Mapping[str, Sequence[str]], folder: Path, elsewhere: Path | None
    ) -> None:
        shown = [described(name) if is_web_address(name) else name for name in missing[:5]]
        where = f"in {folder}" if str(folder) != "." else "in the current folder (--image_folder names another)"
        empty = sum(is_empty(place_of(folder, name)) for name in missing)
        what = "missing or empty" if empty else "missing"
        files = dict.fromkeys(source.rpartition(":")[0] for name in missing for source in used[name])
        named = ", ".join([file for file in files if file][:3]) + (", ..." if len(files) > 3 else "")
        lines = [f"{len(missing):,} of {len(used):,} pictures are {what} {where}"]
        lines += [f"named in {named}"] if named else []
        lines.append(f"first: {', '.join(shown)}" + (", ..." if len(missing) > 5 else ""))
        if empty:
            lines.append(f"{empty:,} are empty files (0 bytes): copy or download them again")
        if elsewhere is not None:
            lines.append(f"there are such files below: --image_folder {elsewhere}")
        addresses = sum(map(is_web_address, missing))
        if addresses:
            lines.append(f"{addresses:,} at a web address: {NOT_FETCHED}")
        outside = sum(isinstance(place_of(folder, name), OutsidePicture) for name in missing)
        if outside:
            lines.append(f"{outside:,} lead out of that folder and are never read; absolute paths: --image_folder /")
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
    """Return the names for which there is no file below `folder`, or an empty one."""
    return [name for name in names if not _num_bytes(place_of(folder, name))]


def is_empty(path: str | Path) -> bool:
    """Return whether a picture is there, and has no content."""
    return _num_bytes(path) == 0


def _num_bytes(path: str | Path) -> int | None:
    """Return the size of a picture file, or of a stored picture; None where there is no file."""
    if isinstance(path, StoredPicture):
        return len(path.content)
    try:
        found = path.stat() if isinstance(path, Path) else None
    except (OSError, ValueError):  # a name that is too long for a file system, say
        return None
    return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None


def find_faults(names: Sequence[str], folder: Path, *, threads: int = 8) -> Iterator[tuple[str, str, str]]:
    """Yield (name, kind of finding, what exactly) of each picture, decoded; a bar shows on a terminal how far it is."""
    from tqdm import tqdm

    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: list(faults(place_of(folder, name))), names)
        for name, some in zip(names, tqdm(found, "pictures", len(names), disable=None, leave=False), strict=True):
            for kind, message in some:
                yield name, kind, message


def faults(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (kind of finding, what exactly) of one picture file, which is decoded as training does."""
    from PIL import Image

    try:
        with Image.open(opened(path)) as image:
            notes = list(_peculiarities(image, Path(path).suffix.lower()))
        load_image(path)
    except ImageError as error:
        yield "corrupt_picture", error.reason
        return
    except Exception:  # PIL's plugins raise whatever they trip over; load_image says it in words
        try:
            load_image(path)
        except ImageError as error:
            yield "corrupt_picture", error.reason
        return
    yield from notes


def _peculiarities(image: Image.Image, suffix: str) -> Iterator[tuple[str, str]]:
    width, height = image.size
    size = f"{width:,} x {height:,}"
    if suffix in SUFFIXES and image.format not in SUFFIXES[suffix]:
        yield "wrong_suffix", f"{image.format} inside"
    if image.getexif().get(ORIENTATION, 1) not in (0, 1):
        yield "rotated_picture", f"EXIF orientation {image.getexif()[ORIENTATION]}"
    if image.mode == "CMYK":
        yield "cmyk_picture", size
    if image.mode.startswith(("I", "F")):
        yield "deep_picture", f"mode {image.mode}"
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        yield "transparent_picture", f"mode {image.mode}"
    if max(width, height) > 10 * min(width, height):
        yield "long_picture", size
    if max(width, height) < 16:
        yield "tiny_picture", size
    if width * height > 40_000_000:
        yield "huge_picture", size
    if image.format != "MPO":
        with suppress(EOFError):
            image.seek(1)
            yield "animated_picture", str(image.format)


def elsewhere(missing: Sequence[str], folder: Path, beside: Path | None) -> Path | None:
    """Return the folder below which the first missing pictures do lie: a neighbour of `folder`, or the data's own."""
    candidates = [folder.parent, *([beside, beside / "images"] if beside else []), folder / "images"]
    near = (place for place in candidates if place != folder)
    return next((place for place in near if any(_num_bytes(place_of(place, name)) for name in missing[:5])), None)
