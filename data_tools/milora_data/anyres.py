"""LLaVA-1.6's tiling ("anyres"): how many tiles and tokens a picture takes.

A picture is shown whole, and again in tiles of the grid that fits it best; each row of the tiles' tokens ends with one
for the line break, and rows or columns that are padding are left out (`spatial_unpad`). The arithmetic is that of
LLaVA's `select_best_resolution`, `process_anyres_image` (llava/mm_utils.py) and `unpad_image` (llava_arch.py), with the
rounding of Hugging Face's `LlavaNextProcessor`, whose model it must fit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """pinpoints: (height, width) of the grids in pixels; tile: pixels a side of a tile; side: its tokens a side.

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
        """Return the tokens of a picture that fills the largest grid."""
        sides = [(rows // self.tile * self.side, columns // self.tile * self.side) for rows, columns in self.pinpoints]
        return max(self.side**2 + rows * columns + rows for rows, columns in sides)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the tiles of a picture: most of its pixels are kept, then least is padding."""

        def rank(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - pinpoint[0] * pinpoint[1]

        best = max(self.pinpoints, key=rank)
        return best[0] // self.tile, best[1] // self.tile

    def num_tiles(self, height: int, width: int) -> int:
        """Return how often the tower runs for a picture: once for the whole, and once a tile."""
        rows, columns = self.grid(height, width)
        return 1 + rows * columns

    def num_tokens(self, height: int, width: int) -> int:
        """Return the tokens of a picture: those of the whole, and of the tiles without padding, with line breaks."""
        rows, columns = (count * self.side for count in self.grid(height, width))
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        return self.side**2 + rows * columns + rows
