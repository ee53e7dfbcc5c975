"""What a frozen vision tower makes of pictures, kept on disk: computed once, read in place of decoding and the tower.

An entry is a file named by a hash of the picture's bytes, in a folder named by all that decides what it holds (tower,
transform, dtype): a picture that changes has another entry, and processes may write the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
import xxhash
from torch import Tensor

from milora_data.anyres import Tiling
from milora_data.errors import DataError
from milora_data.images import content_of
from milora_data.pixels import PixelMaker

PLAIN = "plain"  # the picture that stands for none


class Features(NamedTuple):
    """Of one picture: values (tiles, tokens, channels), one tile unless pictures are cut into some; its size."""

    values: Tensor
    height: int
    width: int


class FeatureReader:
    """Reads what `write` has kept in `folder`; takes the place of a `PixelMaker`, which `maker` is.

    A picture that `maker` cannot read has no entry, and raises the same `ImageError`.
    """

    def __init__(self, folder: Path, maker: PixelMaker, tiling: Tiling | None = None) -> None:
        self.folder, self.maker, self.tiling = folder, maker, tiling

    def read(self, path: str | Path) -> Features:
        """Return the features of a picture. Raises `ImageError`, and `DataError` where they are not kept."""
        entry = self.entry(path)
        if entry is not None and self.holds(entry):
            return self._load(entry)
        self.maker.read(path)
        raise DataError(f"{path}: changed, or added, since the features of pictures were computed; start again")

    def plain_image(self) -> Features:
        """Return the features of the plain picture."""
        return self._load(self.file(PLAIN))

    def inputs(self, images: Sequence[Features]) -> dict[str, Tensor]:
        """Return what the model takes for pictures: pixel_values (num_images, [tiles,] 1, tokens, channels)."""
        if self.tiling is None:
            return {"pixel_values": torch.stack([image.values for image in images])}
        most = max(len(image.values) for image in images)
        rows = [torch.cat([x.values, x.values.new_zeros(most - len(x.values), *x.values.shape[1:])]) for x in images]
        sizes = torch.tensor([[image.height, image.width] for image in images])
        return {"pixel_values": torch.stack(rows)[:, :, None], "image_sizes": sizes}

    def entry(self, path: str | Path) -> Path | None:
        """Return the file of the picture in `path`, which is read for its hash; None where it cannot be read."""
        try:
            return self.file(xxhash.xxh3_128_hexdigest(content_of(path)))
        except (OSError, ValueError):  # a name that is too long for a file system, say
            return None

    def holds(self, entry: Path) -> bool:
        """Whether an entry is there, and whole: a disk that was full or lost its power leaves files cut off."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(entry, framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def file(self, name: str) -> Path:
        """Return the file of an entry."""
        return self.folder / name[:2] / f"{name}.safetensors"

    def write(self, entry: Path, features: Features) -> None:
        """Keep the features of one picture; another process sees them whole or not at all."""
        from safetensors.torch import save_file

        entry.parent.mkdir(parents=True, exist_ok=True)
        part = entry.with_name(f"{entry.name}.{uuid4().hex}.part")
        size = torch.tensor([features.height, features.width])
        save_file({"values": features.values.cpu().contiguous(), "size": size}, part)
        part.replace(entry)

    def _load(self, entry: Path) -> Features:
        from safetensors.torch import load_file

        found = load_file(entry)
        height, width = found["size"].tolist()
        return Features(found["values"], height, width)
