"""The settings of pictures and videos that a model's own processor follows; `models/processors.py` applies them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessorSettings:
    """What a recipe says about the sizes of pictures and videos, and about the frames of video files; None: nothing."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None

    @property
    def of_videos(self) -> list[str]:
        """Return the names of the settings of videos that have a value."""
        names = ("video_min_pixels", "video_max_pixels", "fps", "num_frames")
        return [name for name in names if getattr(self, name) is not None]
