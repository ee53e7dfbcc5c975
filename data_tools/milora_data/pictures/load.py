"""`Picture`; load picture files of any format as RGB (rotation, transparency, size limits), pad them; base64 pictures.

A `Picture` of a record is a name below the image folder, the path of a file, or the bytes of one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from milora_vl.common.cli.console import command_line
from milora_vl.common.cli.web import url_problem
from milora_vl.common.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "DIB": ".bmp", "TIFF": ".tif"}  # other formats: their name
ORIENTATION = 0x0112  # EXIF tag; values above 4 mean that width and height are swapped
_NOT_DECODED_HERE = frozenset(("EPS", "WMF", "FPX", "MIC", "BUFR", "GRIB", "HDF5", "MPEG"))
ImagePolicy = Literal["raise", "skip"]
"""What to do with an unreadable picture: stop, or skip its record."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture or video file of a record: its name, and the path of the file or the bytes of one inside a data set.

    `within` adds the path. A picture without path and bytes is never read: its name leads out of the image folder.
    """

    name: str
    path: Path | None = None
    content: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.path or self.name)

    def within(self, folder: Path) -> Picture:
        """Return the picture with its path below `folder`; unchanged if it has a path or bytes already.

        Data is not trusted: a name that leads out of the folder gets no path.
        """
        if self.path is not None or self.content is not None or leads_outside(folder, self.name):
            return self
        return replace(self, path=folder / self.name)


PictureFile: TypeAlias = str | Path | Picture


def local_name(name: str) -> str:
    """Return the path of a `file://` URL; any other name is returned unchanged.

    >>> local_name("file:///photos/a%20cat.jpg"), local_name("a.jpg")
    ('/photos/a cat.jpg', 'a.jpg')
    """
    is_url = name[:7].lower() == "file://"
    return unquote(name[7:].removeprefix("localhost")) if is_url else name


def leads_outside(folder: Path, name: str) -> bool:
    """Return whether the picture `name` of a record is a path outside `folder`; symbolic links are not resolved.

    Without a folder (`Path()`), no name is outside.

    >>> [leads_outside(Path("images"), name) for name in ("a/../b.png", "../b.png", "/b.png")]
    [False, True, True]
    """
    if not folder.parts or (not name.startswith("/") and ".." not in name):
        return False
    path = Path(os.path.normpath((folder / name).absolute()))
    return not path.is_relative_to(os.path.normpath(folder.absolute()))


class ImageError(DataError):
    """A picture is missing or cannot be decoded. `reason` is the message without the name of the picture."""

    def __init__(self, message: str, reason: str = "", *, code: str = "", where: str = "", hint: str = "") -> None:
        super().__init__(message, code=code, where=where, hint=hint)
        self.reason = reason or message


def load_image(path: PictureFile) -> Image.Image:
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
        problem = url_problem(str(path))
        if problem is not None:
            raise ImageError(problem.message, "a URL", code=problem.code, hint=problem.hint) from None
        reason = "no such file"
    except UnidentifiedImageError:
        reason = "not a picture" if content_of(path) else "the file is empty"
    except Exception as error:  # PIL's plugins raise exceptions of any type
        reason = str(error) or type(error).__name__
    raise _unreadable(path, reason)


@cache
def _formats() -> tuple[str, ...]:
    """Return PIL's formats without those that another program decodes, such as Ghostscript for EPS."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED_HERE)


def opened_picture(path: PictureFile) -> Image.Image:
    """Return the picture in `path` with its pixels not yet decoded. Raises what PIL raises, and OSError."""
    from PIL import Image

    return Image.open(opened(path), formats=_formats())


def _unreadable(path: PictureFile, reason: str) -> ImageError:
    return ImageError(f"cannot read this picture: {reason}", reason, code="image-unreadable", where=str(path))


def picture_size(path: PictureFile) -> tuple[int, int]:
    """Return (height, width) of the upright picture in `path`, read from its header. Raises `ImageError`."""
    try:
        with opened_picture(path) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else (height, width)
    except Exception as error:
        raise _unreadable(path, str(error) or type(error).__name__) from None


def picture_suffix(content: bytes) -> str:
    """Return the suffix for the content of a picture file, such as ".png"; ".img" if it is not a picture."""
    try:
        with opened_picture(Picture("", content=content)) as image:
            return _SUFFIXES.get(str(image.format), f".{image.format}".lower())
    except Exception:  # see load_image
        return ".img"


def opened(picture: PictureFile) -> str | Path | BytesIO:
    """Return the path or the bytes of a picture for PIL to open. Raises `OSError` if it must not be read."""
    if isinstance(picture, Picture):
        if picture.content is not None:
            return BytesIO(picture.content)
        if picture.path is None:
            raise PermissionError("it is outside the image folder")
        picture = picture.path
    if not Path(picture).is_file():
        raise FileNotFoundError(picture)  # PIL would block for ever on a named pipe
    return picture


def content_of(path: PictureFile) -> bytes:
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


def is_embedded(name: object) -> bool:
    return isinstance(name, str) and name[:5].lower() == "data:"


def described(name: str) -> str:
    """Return a short description of a URL, without its content; the name of a file is returned unchanged.

    >>> described("data:image/png;base64,iVBORw0KGgo="), described("https://example.org/a.png?token=1")
    ('data:image/png;base64, 12 characters', 'https://example.org/a.png')
    """
    if is_embedded(name):
        header, _, body = name.partition(",")
        return f"{header[:60]}, {len(body):,} characters"
    address = urlsplit(name)
    if not address.scheme:
        return name[:200]
    return f"{address.scheme}://{address.netloc}{address.path}"[:200]


def refusal(source: str) -> DataError:
    """Return the error for a record with an embedded picture; its hint is a command that writes pictures to files."""
    file = source.rpartition(":")[0] or "DATA"
    return DataError(
        "a picture is embedded as base64, and a question names picture files",
        code="image-embedded",
        hint=f"write the pictures to files: {command_line('milora_data', 'convert', file, '--output_dir', 'OUT')}",
    )


def decoded(name: str) -> Picture:
    """Return an embedded picture as a stored picture, named by a hash of its content. Raises `ImageError`."""
    header, comma, body = name.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _broken(name, "it is not in base64")
    text = b"".join(unquote_to_bytes(body).split())
    try:
        content = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _broken(name, f"its base64 is broken: {error}") from None
    suffix = picture_suffix(content)
    if suffix == ".img":
        raise _broken(name, "not a picture" if content else "it is empty")
    return Picture(hashlib.blake2b(content, digest_size=8).hexdigest() + suffix, content=content)


def _broken(name: str, reason: str) -> ImageError:
    return ImageError(
        f"an embedded picture ({described(name)}) cannot be read: {reason}",
        reason,
        code="image-unreadable",
        hint="embed the picture again, or remove the record",
    )
