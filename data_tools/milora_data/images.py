"""Picture files to RGB, whatever is inside them, and LLaVA's padding to a square."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from milora_data.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112  # EXIF's tag: values above 4 are pictures stored on their side
ImagePolicy = Literal["raise", "skip", "replace"]
"""What to do with a picture that cannot be read: stop, leave its record out, or show a plain picture in its place."""


class StoredPicture(str):
    """The name of a picture that is stored inside a data set; `content` holds the bytes of its file.

    Many sets call all their pictures the same: two are equal if name and content are.
    """

    content: bytes

    def __new__(cls, name: str, content: bytes) -> StoredPicture:
        """Return `name` with the bytes of its file."""
        made = super().__new__(cls, name)
        made.content = content
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredPicture) and str.__eq__(self, other) and self.content == other.content

    def __hash__(self) -> int:
        return hash((str(self), self.content))

    def __reduce__(self) -> tuple[type[StoredPicture], tuple[str, bytes]]:
        return type(self), (str(self), self.content)


class PlacedPicture(str):
    """The path of a picture that the image folder of its source has been put before: no other folder confines it."""


class OutsidePicture(str):
    """The name of a picture that leads out of the image folder: it is never read."""


def leads_outside(folder: Path, name: str) -> bool:
    """Return whether a record's `name` of a picture, taken literally, is no path below `folder`.

    Where no folder is named (`Path()`) there is none to leave: names are taken as they are.

    >>> [leads_outside(Path("images"), name) for name in ("a/../b.png", "../b.png", "/b.png")]
    [False, True, True]
    """
    if not folder.parts or (not name.startswith("/") and ".." not in name):
        return False
    place = Path(os.path.normpath((folder / name).absolute()))
    return not place.is_relative_to(os.path.normpath(folder.absolute()))


def place_of(folder: Path, name: str) -> str | Path:
    """Return what `load_image` reads for the picture `name` of a record: a file below `folder`, or the stored one.

    Data may come from anybody: a name that leads out of the folder becomes one that cannot be read.
    """
    if isinstance(name, StoredPicture):
        return name
    if not isinstance(name, PlacedPicture) and leads_outside(folder, name):
        return OutsidePicture(name)
    return folder / name


class ImageError(DataError):
    """A picture file that is missing or cannot be decoded."""


def load_image(path: str | Path, *, longest: int | None = None, shortest: int | None = None) -> Image.Image:
    """Return the picture in `path`, decoded, upright (EXIF) and RGB; alpha is dropped as LLaVA does.

    16-bit grey is scaled to 8 bits (PIL alone would clip it to white); of an animation, the first picture counts.
    With `longest` (or `shortest`), a JPEG is decoded smaller than it is, with at least so many pixels on that side.
    Raises `ImageError`: missing, empty, cut off, not a picture, far more pixels than a photo has.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(opened(path)) as image:
            least = longest or shortest
            if least:
                share = least / (max(image.size) if longest else min(image.size))
                image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        size = len(path.content) if isinstance(path, StoredPicture) else Path(path).stat().st_size
        reason = "not a picture" if size else "the file is empty"
    except Exception as error:  # PIL's plugins raise whatever they trip over: OSError, SyntaxError, struct.error, ...
        reason = str(error) or type(error).__name__
    raise ImageError(f"{path}: cannot read this picture: {reason}")


def picture_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) of the upright picture in `path` by its header. Raises `ImageError`."""
    from PIL import Image

    try:
        with Image.open(opened(path)) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else (height, width)
    except Exception as error:  # PIL's plugins raise whatever they trip over
        raise ImageError(f"{path}: cannot read this picture: {error or type(error).__name__}") from None


def opened(path: str | Path) -> str | Path | BytesIO:
    """Return what PIL opens: the path, or the bytes of a stored picture. Raises `OSError` where it may not."""
    if isinstance(path, StoredPicture):
        return BytesIO(path.content)
    if isinstance(path, OutsidePicture):
        raise PermissionError("it is outside the image folder")
    if not Path(path).is_file():
        raise FileNotFoundError(path)  # PIL would wait for ever for what comes out of a named pipe
    return path


def content_of(path: str | Path) -> bytes:
    """Return the bytes of a picture file, or of a stored picture. Raises `OSError`."""
    found = opened(path)
    return found.getvalue() if isinstance(found, BytesIO) else Path(found).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB: grey of more than 8 bits scaled to them, alpha dropped as LLaVA does.

    Floats mean shares of 1 if none is larger, grey levels if none is above 255, and else shares of the largest.
    """
    if image.mode == "F":
        scale = _levels(image)
        image = image.point(lambda value: value * scale).convert("L")
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode == "P":
        image = image.convert("RGBA")  # palettes with transparency make PIL warn otherwise
    return image.convert("RGB")


def _levels(image: Image.Image) -> float:
    """Return what the floats of a picture are multiplied by to be grey levels of 0 to 255."""
    import numpy as np

    largest = float(np.nan_to_num(np.asarray(image), posinf=0.0).max())
    return 255.0 if largest <= 1 else 1.0 if largest <= 255 else 255 / largest


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
    """Return a box (left, top, right, bottom) in pixels as shares of the square that `expand_to_square` makes.

    So LLaVA-1.5 was trained to name boxes (its issues 606 and 822).

    >>> on_padded_square((0, 0, 200, 100), 200, 100)
    (0.0, 0.25, 1.0, 0.75)
    """
    side = max(width, height)
    x, y = (side - width) // 2, (side - height) // 2
    left, top, right, bottom = box
    return (left + x) / side, (top + y) / side, (right + x) / side, (bottom + y) / side


def unmistakable(images: Sequence[Any]) -> list[Any]:
    """Return RGB pictures (or tensors made of them) in a form in which no processor takes rows for channels.

    Transformers 4 turns pictures into arrays, takes the first side of the first for the channels if that is 1 or 3, and
    all others to be of the same form. So they are all given with channels first as soon as one is that narrow.
    """
    import numpy as np
    from PIL import Image

    pictures = [image for image in images if isinstance(image, Image.Image)]
    if not any(picture.height in (1, 3) for picture in pictures):
        return list(images)
    return [np.array(one).transpose(2, 0, 1) if isinstance(one, Image.Image) else one for one in images]
