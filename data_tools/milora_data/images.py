"""Picture files to RGB, whatever is inside them, and LLaVA's padding to a square."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import DataError

if TYPE_CHECKING:
    from PIL import Image

ImagePolicy = Literal["raise", "skip", "replace"]
"""What to do with a picture that cannot be read: stop, leave its record out, or show a plain picture in its place."""


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
        with Image.open(path) as image:
            least = longest or shortest
            if least:
                share = least / (max(image.size) if longest else min(image.size))
                image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        reason = "not a picture" if Path(path).stat().st_size else "the file is empty"
    except Exception as error:  # PIL's plugins raise whatever they trip over: OSError, SyntaxError, struct.error, ...
        reason = str(error) or type(error).__name__
    raise ImageError(f"{path}: cannot read this picture: {reason}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB: 16-bit grey scaled to 8 bits, alpha dropped as LLaVA does."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode == "P":
        image = image.convert("RGBA")  # palettes with transparency make PIL warn otherwise
    return image.convert("RGB")


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
