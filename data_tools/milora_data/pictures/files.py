"""Load picture files of any format as RGB (rotation, transparency, size limits), and pad them to a square."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from milora_data.pictures.download import downloaded
from milora_vl.common.cli.web import url_problem
from milora_vl.common.errors import DataError

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
ORIENTATION = 0x0112  # EXIF tag; values above 4 mean that width and height are swapped
_NOT_DECODED_HERE = frozenset(("EPS", "WMF", "FPX", "MIC", "BUFR", "GRIB", "HDF5", "MPEG"))
WebPictures = Literal["refuse", "download"]
ImagePolicy = Literal["raise", "skip", "replace"]
"""What to do with an unreadable picture: stop, skip its record, or replace it by a plain picture."""


class StoredPicture(str):
    """The name of a picture that is stored inside a data set; `content` holds the bytes of its file.

    Many data sets give all pictures the same name: two are equal if name and content are equal.
    """

    content: bytes

    def __new__(cls, name: str, content: bytes) -> StoredPicture:
        """Return `name` with the bytes of its file."""
        picture = super().__new__(cls, name)
        picture.content = content
        return picture

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredPicture) and str.__eq__(self, other) and self.content == other.content

    def __hash__(self) -> int:
        return hash((str(self), self.content))

    def __reduce__(self) -> tuple[type[StoredPicture], tuple[str, bytes]]:
        return type(self), (str(self), self.content)


class PlacedPicture(str):
    """The path of a picture that already includes the image folder of its source; it may be outside other folders."""


class WebPicture(str):
    """The web address of a picture that may be downloaded; without this type, an address is never opened."""


class OutsidePicture(str):
    """The name of a picture outside the image folder; it is never read."""


def leads_outside(folder: Path, name: str) -> bool:
    """Return whether the picture `name` of a record is a path outside `folder`; symbolic links are not resolved.

    Without a folder (`Path()`), no name is outside.

    >>> [leads_outside(Path("images"), name) for name in ("a/../b.png", "../b.png", "/b.png")]
    [False, True, True]
    """
    if not folder.parts or (not name.startswith("/") and ".." not in name):
        return False
    place = Path(os.path.normpath((folder / name).absolute()))
    return not place.is_relative_to(os.path.normpath(folder.absolute()))


def place_of(folder: Path, name: str) -> str | Path:
    """Return the argument of `load_image` for the picture `name` of a record: a file below `folder`, or stored bytes.

    Data is not trusted: a name that leads out of the folder becomes an `OutsidePicture`, which is never read.
    """
    if isinstance(name, StoredPicture | WebPicture):
        return name
    if not isinstance(name, PlacedPicture) and leads_outside(folder, name):
        return OutsidePicture(name)
    return folder / name


class ImageError(DataError):
    """A picture is missing or cannot be decoded. `reason` is the message without the name of the picture."""

    def __init__(self, message: str, reason: str = "", *, code: str = "", where: str = "", hint: str = "") -> None:
        super().__init__(message, code=code, where=where, hint=hint)
        self.reason = reason or message


def load_image(path: str | Path) -> Image.Image:
    """Return the picture in `path` as RGB, turned upright (EXIF); alpha is dropped as in LLaVA.

    16-bit grey is scaled to 8 bits (PIL alone would clip it to white). An animation gives its first frame.
    Raises `ImageError` if the file is missing, empty, truncated, not a picture, or has too many pixels.
    """
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with opened_picture(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # without a copy of an upright picture
            return to_rgb(image)
    except FileNotFoundError:
        problem = url_problem(path)
        if problem is not None:
            raise ImageError(problem.message, "a URL", code=problem.code, hint=problem.hint) from None
        reason, hint = "no such file", ""
    except UnidentifiedImageError:
        reason, hint = "not a picture" if content_of(path) else "the file is empty", ""
    except Exception as error:  # PIL's plugins raise exceptions of any type
        reason, hint = _reason(error)
    raise _unreadable(path, reason, hint)


@cache
def _formats() -> tuple[str, ...]:
    """Return PIL's formats without those that another program decodes, such as Ghostscript for EPS."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED_HERE)


def opened_picture(path: str | Path) -> Image.Image:
    """Return the picture in `path` with its pixels not yet decoded. Raises what PIL raises, and OSError."""
    from PIL import Image

    return Image.open(opened(path), formats=_formats())


def _unreadable(path: str | Path, reason: str, hint: str) -> ImageError:
    where = str(path).partition("?")[0] if isinstance(path, WebPicture) else str(path)  # without tokens
    return ImageError(f"cannot read this picture: {reason}", reason, code="image-unreadable", where=where, hint=hint)


def _reason(error: Exception) -> tuple[str, str]:
    """Return why PIL cannot read a picture, and a hint. PIL's plugins raise OSError, struct.error and others."""
    from PIL import Image

    if isinstance(error, Image.DecompressionBombError):
        return str(error), "save it smaller: models use a few hundred pixels a side"
    return str(error) or type(error).__name__, ""


def picture_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) of the upright picture in `path`, read from its header. Raises `ImageError`."""
    try:
        with opened_picture(path) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else (height, width)
    except Exception as error:
        raise _unreadable(path, *_reason(error)) from None


def picture_suffix(content: bytes) -> str:
    """Return the suffix for the content of a picture file, such as ".png"; ".img" if it is not a picture."""
    try:
        with opened_picture(StoredPicture("", content)) as image:
            known = (suffix for suffix, formats in SUFFIXES.items() if image.format in formats)
            return next(known, f".{image.format}".lower())
    except Exception:  # see _reason
        return ".img"


def opened(path: str | Path) -> str | Path | BytesIO:
    """Return the path or the bytes of a stored picture for PIL to open. Raises `OSError` if it must not be read."""
    if isinstance(path, StoredPicture):
        return BytesIO(path.content)
    if isinstance(path, WebPicture):
        return downloaded(path)
    if isinstance(path, OutsidePicture):
        raise PermissionError("it is outside the image folder")
    if not Path(path).is_file():
        raise FileNotFoundError(path)  # PIL would block for ever on a named pipe
    return path


def content_of(path: str | Path) -> bytes:
    """Return the bytes of a picture file, or of a stored picture. Raises `OSError`."""
    file = opened(path)
    return file.getvalue() if isinstance(file, BytesIO) else Path(file).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB: grey of more than 8 bits is scaled to 8, alpha is dropped as in LLaVA."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode == "P":
        image = image.convert("RGBA")  # avoids PIL's warning about palettes with transparency
    return image if image.mode == "RGB" else image.convert("RGB")  # PIL would copy it


def expand_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return `image` centred on a square of its longer side, filled with `color` (LLaVA's `expand2square`)."""
    from PIL import Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def on_padded_square(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Return a box (left, top, right, bottom) in pixels as fractions of the square that `expand_to_square` returns.

    LLaVA-1.5 was trained with such boxes (its issues 606 and 822).

    >>> on_padded_square((0, 0, 200, 100), 200, 100)
    (0.0, 0.25, 1.0, 0.75)
    """
    side = max(width, height)
    x, y = (side - width) // 2, (side - height) // 2
    left, top, right, bottom = box
    return (left + x) / side, (top + y) / side, (right + x) / side, (bottom + y) / side
