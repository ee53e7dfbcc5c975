"""A video as its frames: pictures of one size, with their number per second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from milora_vl.base.errors import DataError


class Frames(NamedTuple):
    """A video as its frames (PIL), and their number per second, if it is known."""

    frames: tuple[Any, ...]
    fps: float | None = None

    def metadata(self) -> dict[str, Any]:
        """Return what processors write time stamps from: the frames are all there are."""
        count = len(self.frames)
        return {"total_num_frames": count, "fps": self.fps, "frames_indices": list(range(count))}


def require_one_size(frames: Sequence[Any], where: str) -> tuple[Any, ...]:
    """Return the frames of a video (PIL). Raises `DataError` at `where` if they have several sizes."""
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sizes[:3])
        raise DataError(
            f"the frames of a video have several sizes: {shown}",
            code="video-frame-sizes",
            where=where,
            hint="save the frames of a video in one size",
        )
    return tuple(frames)
