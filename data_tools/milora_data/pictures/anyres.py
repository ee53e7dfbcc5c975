"""LLaVA-1.6's tiling ("anyres"): the grid, the number of tiles and of tokens of a picture.

The model sees the whole picture, and the picture again in the tiles of the best fitting grid. Each row of tile tokens
ends with a line break token, and rows or columns of padding are removed (`spatial_unpad`). The computation follows
LLaVA's `select_best_resolution`, `process_anyres_image` (llava/mm_utils.py) and `unpad_image` (llava_arch.py), with the
rounding of Hugging Face's `LlavaNextProcessor`, because it must match that model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """pinpoints: (height, width) of the grids in pixels; tile: pixels per side of a tile; side: its tokens per side.

    >>> llava = Tiling(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), 336, 24)
    >>> llava.num_tiles(480, 640), llava.num_tokens(480, 640)
    (5, 2340)
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

    def num_tiles(self, height: int, width: int) -> int:
        """Return the number of tower inputs for a picture: the whole picture, and each tile."""
        rows, columns = self.grid(height, width)
        return 1 + rows * columns

    def num_tokens(self, height: int, width: int) -> int:
        """Return the number of tokens: the whole picture, the tiles without padding, and a line break per row."""
        rows, columns = (count * self.side for count in self.grid(height, width))
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        return self.side**2 + rows * columns + rows
