"""The disk cache of a frozen vision tower's features: keys, files, reading them in place of pixels.

An entry is a file named by a hash of the picture's bytes, in a folder named by the tower, its transform and its dtype.
A changed picture has another entry, and several processes may write the same entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from milora_data.pictures.anyres import Tiling
from milora_data.pictures.files import content_of
from milora_data.pictures.pixels import PixelMaker
from milora_vl.common.atomic_write import atomic_file
from milora_vl.common.errors import DataError

PLAIN = "plain"  # entry of the plain picture, used for batches without pictures


class Features(NamedTuple):
    """Features of one picture (tiles, tokens, channels), with one tile if it is not tiled; its size in pixels."""

    values: Tensor
    height: int
    width: int


class FeatureReader:
    """Reads features that `write` has stored in `folder`; replaces the `PixelMaker` `maker`.

    A picture that `maker` cannot read has no entry and raises the same `ImageError`.
    """

    def __init__(self, folder: Path, maker: PixelMaker, tiling: Tiling | None = None) -> None:
        self.folder, self.maker, self.tiling = folder, maker, tiling

    def read(self, path: str | Path) -> Features:
        """Return the features of a picture. Raises `ImageError`, or `DataError` if they are not in the cache."""
        entry = self.entry(path)
        if entry is not None and self.holds(entry):
            return self._load(entry)
        self.maker.read(path)
        raise DataError(
            "changed, or added, since the features of pictures were computed",
            code="feature-cache-stale",
            where=str(path),
            hint="start the run again",
        )

    def plain_image(self) -> Features:
        """Return the features of the plain picture."""
        return self._load(self.file(PLAIN))

    def inputs(self, images: Sequence[Features]) -> dict[str, Tensor]:
        """Return the model's inputs: pixel_values (num_images, [tiles,] 1, tokens, channels), and image_sizes."""
        if self.tiling is None:
            return {"pixel_values": torch.stack([image.values for image in images])}
        most = max(len(image.values) for image in images)
        rows = [torch.cat([x.values, x.values.new_zeros(most - len(x.values), *x.values.shape[1:])]) for x in images]
        sizes = torch.tensor([[image.height, image.width] for image in images])
        return {"pixel_values": torch.stack(rows)[:, :, None], "image_sizes": sizes}

    def entry(self, path: str | Path) -> Path | None:
        """Return the cache file of the picture in `path`, which is read for its hash; None if it cannot be read."""
        try:
            return self.file(xxhash.xxh3_128_hexdigest(content_of(path)))
        except (OSError, ValueError):  # for example, a name that is too long for the file system
            return None

    def holds(self, entry: Path) -> bool:
        """Return whether an entry exists and is complete; a full disk or a power failure leaves truncated files."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(entry, framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def file(self, name: str) -> Path:
        """Return the path of an entry."""
        return self.folder / name[:2] / f"{name}.safetensors"

    def write(self, entry: Path, features: Features) -> None:
        """Store the features of one picture atomically."""
        from safetensors.torch import save_file

        size = torch.tensor([features.height, features.width])
        with atomic_file(entry) as part:
            save_file({"values": features.values.cpu().contiguous(), "size": size}, part)

    def _load(self, entry: Path) -> Features:
        from safetensors.torch import load_file

        tensors = load_file(entry)
        height, width = tensors["size"].tolist()
        return Features(tensors["values"], height, width)
