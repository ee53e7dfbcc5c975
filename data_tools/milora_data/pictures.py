"""Which pictures of a data set are missing, which cannot be read, and what is peculiar about others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.errors import DataError
from milora_data.images import ORIENTATION, ImageError, OutsidePicture, StoredPicture, load_image, opened, place_of
from milora_data.records import Record

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".gif": ("GIF",),
    ".webp": ("WEBP",),
    ".bmp": ("BMP", "DIB"),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
}


class MissingImages(DataError):
    """Pictures that records name and that are not there; says how many, the first few, and what to do."""

    def __init__(self, missing: Sequence[str], total: int, folder: Path, elsewhere: Path | None) -> None:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        where = f"in {folder}" if str(folder) != "." else "here (no --image_folder is given)"
        lines = [f"{len(missing):,} of {total:,} pictures are missing {where}", f"first: {first}"]
        if elsewhere is not None:
            lines.append(f"there are such files below: --image_folder {elsewhere}")
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
    """Return the names for which there is no file below `folder`."""
    return [name for name in names if not (isinstance(name, StoredPicture) or _is_file(place_of(folder, name)))]


def _is_file(path: str | Path) -> bool:
    try:
        return isinstance(path, Path) and path.is_file()
    except (OSError, ValueError):  # a name that is too long for a file system, say
        return False


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
        yield "corrupt_picture", str(error).split("cannot read this picture: ", 1)[-1]
        return
    except Exception:  # PIL's plugins raise whatever they trip over; load_image says it in words
        try:
            load_image(path)
        except ImageError as error:
            yield "corrupt_picture", str(error).split("cannot read this picture: ", 1)[-1]
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
    return next((place for place in near if any(_is_file(place_of(place, name)) for name in missing[:5])), None)
