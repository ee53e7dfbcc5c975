"""Find the pictures of a data set that are missing or unreadable."""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from milora_data.pictures.embedded import NOT_FETCHED, described
from milora_data.pictures.files import (
    ImageError,
    OutsidePicture,
    StoredPicture,
    WebPicture,
    load_image,
    place_of,
)
from milora_data.pictures.videos import require_whole_video
from milora_vl.common.cli.command_line import amount
from milora_vl.common.cli.web import web_address
from milora_vl.common.errors import DataError

SMALLEST = 8  # pixels of a side, below which a picture shows nothing


class MissingImages(DataError):
    """Records name pictures that are missing or empty; the message has their number and the first few.

    `used` maps each picture to the first record that names it. The place is the first record with such a picture.
    """

    def __init__(self, missing: Sequence[str], used: Mapping[str, str], folder: Path, elsewhere: Path | None) -> None:
        shown = [described(name) if web_address(name) else name for name in missing[:5]]
        place = f"in {folder}" if str(folder) != "." else "in the current folder"
        empty = sum(is_empty(place_of(folder, name)) for name in missing)
        state = "missing or empty" if empty else "missing"
        more = ", ..." if len(missing) > 5 else ""
        message = f"{len(missing):,} of {len(used):,} pictures are {state} {place}: {', '.join(shown)}{more}"
        hints = []
        if str(folder) == ".":
            hints.append("name their folder:  --image_folder FOLDER")
        if empty:
            hints.append(f"{amount(empty, 'empty file')} (0 bytes): copy or download again")
        if elsewhere is not None:
            hints.append(f"files with these names exist in another folder: --image_folder {elsewhere}")
        addresses = sum(web_address(name) is not None for name in missing)
        if addresses:
            hints.append(f"{addresses:,} at a web address: {NOT_FETCHED}")
        outside = sum(isinstance(place_of(folder, name), OutsidePicture) for name in missing)
        if outside:
            hints.append(f"{outside:,} lead out of that folder and are never read; absolute paths: --image_folder /")
        hints.append("skip their records: --bad_images skip; show a plain picture instead: --bad_images replace")
        super().__init__(message, code="data-missing-pictures", where=used[missing[0]], hint="\n".join(hints))


def find_missing(names: Iterable[str], folder: Path) -> list[str]:
    """Return the names whose file below `folder` is missing or empty."""
    return [name for name in names if not _num_bytes(place_of(folder, name))]


def is_empty(path: str | Path) -> bool:
    """Return whether a picture exists and has no content."""
    return _num_bytes(path) == 0


def cause(path: str | Path, names: dict[Path, dict[str, str]]) -> str:
    """Return why there is no file at `path`, behind its name: a broken link, or another case; "" if neither.

    `names` keeps the names in each folder for the next call.
    """
    try:
        if not isinstance(path, Path):
            return ""
        if path.is_symlink():
            return f": a broken link to {path.readlink()}"
        if path.parent not in names:
            names[path.parent] = {file.name.lower(): file.name for file in path.parent.iterdir()}
    except (OSError, ValueError):  # no such folder, or a name that is too long for the file system
        return ""
    near = names[path.parent].get(path.name.lower())
    return f": the folder has {near}, in another case" if near else ""


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


def find_faults(
    names: Sequence[str], folder: Path, videos: Collection[str] = (), *, threads: int = 8
) -> Iterator[tuple[str, str, str]]:
    """Yield (name, kind of finding, details) of each bad picture; shows a progress bar on a terminal.

    Each of the `videos` is read to its end, and its first frame is decoded.
    """
    from tqdm import tqdm

    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda name: _fault(place_of(folder, name), name in videos), names)
        bar = tqdm(results, "pictures", len(names), disable=None, leave=False)
        yield from ((name, *fault) for name, fault in zip(names, bar, strict=True) if fault)


def _fault(path: str | Path, is_video: bool) -> tuple[str, str] | None:
    try:
        if is_video:
            require_whole_video(path)
        elif min(size := load_image(path).size) < SMALLEST:
            return "tiny_picture", f"{size[0]} x {size[1]} pixels"
    except ImageError as error:
        details = "\n".join(filter(None, (error.reason, error.first.hint)))
        return "corrupt_video" if is_video else "corrupt_picture", details
    return None


def elsewhere(missing: Sequence[str], folder: Path, beside: Path | None) -> Path | None:
    """Return a folder near `folder` or beside the data that contains one of the first missing pictures, or None."""
    candidates = [folder.parent, *([beside, beside / "images"] if beside else []), folder / "images"]
    near = (place for place in candidates if place != folder)
    return next((place for place in near if any(_num_bytes(place_of(place, name)) for name in missing[:5])), None)
