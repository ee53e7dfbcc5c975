"""Pad pictures to a square, as LLaVA does, and make a model's pixel values with its image processor; tiles.

`Tiling` is LLaVA-1.6's ("anyres"): the model sees the whole picture, and the picture again in the tiles of the best
fitting grid. Each row of tile tokens ends with a line break token, and rows or columns of padding are removed
(`spatial_unpad`). The computation follows LLaVA's `select_best_resolution`, `process_anyres_image` (llava/mm_utils.py)
and `unpad_image` (llava_arch.py), with the rounding of Hugging Face's `LlavaNextProcessor`, which it must match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from milora_data.pictures.load import PictureFile, expand_to_square, load_image

if TYPE_CHECKING:
    from PIL import Image

AspectRatio = Literal["pad", "plain", "anyres"]


class PixelMaker:
    """Computes pixel values (num_images, 3, height, width), as `image_processor` does."""

    def __init__(self, image_processor: Any, aspect_ratio: AspectRatio = "pad") -> None:
        self.image_processor = image_processor
        self.aspect_ratio = aspect_ratio

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Return the pixel values of pictures from `read` or `prepare`, in order."""
        return self.inputs(images)["pixel_values"]

    def inputs(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Return the model's inputs: pixel_values, and image_sizes (num_images, 2) for tiled pictures.

        For tiled pictures, pixel_values is (num_images, tiles, 3, height, width), padded with tiles of zeros.
        """
        if self.aspect_ratio != "anyres":
            return {"pixel_values": torch.stack(list(images))}
        return dict(self.image_processor(images=list(images), return_tensors="pt"))

    def read(self, path: PictureFile) -> Any:
        """Return the picture in `path` as `prepare` does. Raises `ImageError` if the file cannot be read."""
        return self.prepare(load_image(path))

    def prepare(self, image: Image.Image) -> Any:
        """Return the pixel values of a picture (3, height, width); a picture that is tiled stays unchanged."""
        if self.aspect_ratio == "anyres":
            return image
        # The picture is square already, or must not be padded ("plain"): turn off the processor's own padding.
        options = {"do_pad": False} if self.image_processor.to_dict().get("do_pad") else {}
        shown = expand_to_square(image, self.color) if self.aspect_ratio == "pad" else image
        return self.image_processor(images=[shown], return_tensors="pt", **options)["pixel_values"][0]

    def plain_image(self) -> Any:
        """Return a picture of the mean colour; its normalized pixel values are about zero."""
        from PIL import Image

        return self.prepare(Image.new("RGB", (32, 32), self.color))

    @property
    def color(self) -> tuple[int, int, int]:
        red, green, blue = (int(255 * mean) for mean in self.image_processor.image_mean)
        return red, green, blue

    @cached_property
    def side(self) -> int:
        return int(self([self.plain_image()]).shape[-1])


@dataclass(frozen=True, slots=True)
class Tiling:
    """pinpoints: (height, width) of the grids in pixels; tile: pixels per side of a tile; side: its tokens per side.

    >>> llava = Tiling(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), 336, 24)
    >>> llava.num_tokens(480, 640)
    2340
    >>> llava.most_tokens
    2928
    """

    pinpoints: tuple[tuple[int, int], ...]
    tile: int
    side: int

    @property
    def most_tokens(self) -> int:
        """Return the number of tokens of a picture that fills the largest grid."""
        sides = [(rows // self.tile * self.side, columns // self.tile * self.side) for rows, columns in self.pinpoints]
        return max(self.side**2 + rows * columns + rows for rows, columns in sides)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the grid that keeps most pixels of a picture and, if equal, has least padding."""

        def rank(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - pinpoint[0] * pinpoint[1]

        best = max(self.pinpoints, key=rank)
        return best[0] // self.tile, best[1] // self.tile

    def num_tokens(self, height: int, width: int) -> int:
        """Return the number of tokens: the whole picture, the tiles without padding, and a line break per row."""
        rows, columns = (count * self.side for count in self.grid(height, width))
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        return self.side**2 + rows * columns + rows
