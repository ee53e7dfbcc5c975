"""Picture files to the pixel values of a model's own image processor, bit for bit, but sooner.

LLaVA pads a picture to a square and has the square resized. Here the two passes of the resizing (along the rows, then
along the columns) are done one by one, and what is padding is made small first: the same numbers for less work, and a
picture of 1 x 60,000 pixels never becomes a square of 10 GB. It is used where a trial shows that it is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from milora_data.images import expand_to_square, load_image, unmistakable

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

AspectRatio = Literal["pad", "plain", "anyres"]
JpegDecoding = Literal["exact", "draft"]
"""`draft` decodes a large JPEG at a half, quarter or eighth of its size, never below twice what is needed."""

_STRIP = 16_000_000  # pixels of a tall picture that are padded at a time
_LONGEST = 20  # times as long as wide: beyond that, only the middle of an unpadded picture is resized


class PixelMaker:
    """Pictures to pixel values (num_images, 3, height, width), as `image_processor` makes them."""

    def __init__(
        self, image_processor: Any, aspect_ratio: AspectRatio = "pad", jpeg_decoding: JpegDecoding = "exact"
    ) -> None:
        self.image_processor = image_processor
        self.aspect_ratio = aspect_ratio
        self.jpeg_decoding = jpeg_decoding

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Return the pixel values of pictures that `read` or `prepare` gave, in order."""
        return self.inputs(images)["pixel_values"]

    def inputs(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Return what the model takes: pixel_values, and image_sizes (num_images, 2) where pictures are tiled.

        Tiled, pixel_values are (num_images, tiles, 3, height, width), with zeros for the tiles that a picture lacks.
        """
        # What is square already is not padded again; a processor that pads by itself must not do so for "plain".
        padding = self.aspect_ratio != "anyres" and self.image_processor.to_dict().get("do_pad")
        options = {"do_pad": False} if padding else {}
        return dict(self.image_processor(images=unmistakable(images), return_tensors="pt", **options))

    def read(self, path: str | Path) -> Any:
        """Return the picture in `path`, small and square if that is what the processor would make of it.

        Raises `ImageError` for a file that cannot be read.
        """
        if self.aspect_ratio == "anyres":  # how it is tiled depends on its true size
            return load_image(path)
        least = 2 * self.side if self.jpeg_decoding == "draft" else None
        return self.prepare(load_image(path, longest=least if self.aspect_ratio == "pad" else None, shortest=least))

    def prepare(self, image: Image.Image) -> Any:
        """Return an RGB picture as this maker takes it."""
        if self.aspect_ratio == "anyres":
            return image
        if self.aspect_ratio == "plain":
            return _middle(image)
        if self._two_passes:
            return shrink_to_square(image, self.side, self.color)
        return expand_to_square(image, self.color)

    def plain_image(self) -> Any:
        """Return a picture of the mean colour, which the model sees as zeros."""
        from PIL import Image

        return self.prepare(Image.new("RGB", (32, 32), self.color))

    @property
    def color(self) -> tuple[int, int, int]:
        """The mean colour, with which pictures are padded."""
        red, green, blue = (int(255 * mean) for mean in self.image_processor.image_mean)
        return red, green, blue

    @cached_property
    def side(self) -> int:
        """Pixels on a side of what the processor makes."""
        from PIL import Image

        return int(self([Image.new("RGB", (32, 32))]).shape[-1])

    @cached_property
    def _two_passes(self) -> bool:
        """Whether this processor resizes as torch does with integers: tried on a wide and on a tall picture."""
        from PIL import Image

        for size in ((97, 60), (31, 3 * self.side)):
            image = Image.effect_noise(size, 90).convert("RGB")
            whole = self([expand_to_square(image, self.color)])
            if not torch.equal(self([shrink_to_square(image, self.side, self.color)]), whole):
                log.info("%s resizes in its own way", type(self.image_processor).__name__)
                return False
        return True


def shrink_to_square(image: Image.Image, side: int, color: tuple[int, int, int]) -> Tensor:
    """Return an RGB picture padded to a square with `color` and resized (bicubic): uint8 (3, side, side)."""
    import numpy as np

    width, height = image.size
    longest = max(width, height)
    left, top = (longest - width) // 2, (longest - height) // 2
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    if width < height:
        rows = max(1, _STRIP // longest)
        strips = (pixels[:, :, start : start + rows] for start in range(0, height, rows))
        narrow = torch.cat([_resized(_framed(strip, longest, left, 3, color), side, 3) for strip in strips], dim=2)
    else:
        narrow = _framed(_resized(pixels, side, 3), longest, top, 2, color)
    return _resized(narrow, side, 2)[0].contiguous()


def _resized(pixels: Tensor, side: int, dim: int) -> Tensor:
    """Return `pixels` (1, 3, height, width) with `side` pixels along `dim`."""
    size = (side, pixels.shape[3]) if dim == 2 else (pixels.shape[2], side)
    return interpolate(pixels, size, mode="bicubic", antialias=True)


def _framed(pixels: Tensor, length: int, offset: int, dim: int, color: tuple[int, int, int]) -> Tensor:
    """Return `pixels` (1, 3, height, width) at `offset` of a picture that is `length` along `dim`."""
    shape = list(pixels.shape)
    shape[dim] = length
    frame = torch.tensor(color, dtype=torch.uint8)[None, :, None, None].expand(shape)
    frame = frame.contiguous(memory_format=torch.channels_last)
    frame.narrow(dim, offset, pixels.shape[dim]).copy_(pixels)
    return frame


def _middle(image: Image.Image) -> Image.Image:
    """Return the middle of a picture that is too long to be resized as a whole; its ends would be cropped anyway."""
    width, height = image.size
    longest = _LONGEST * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))
