"""Videos: picture files of frames in one size, or a file that transformers' `load_video` decodes with PyAV.

The model's own video processor decides which frames of a file are read (`sample_frames`), as in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from milora_data.pictures.load import ImageError, PictureFile, opened
from milora_vl.common.cli.web import url_problem
from milora_vl.common.errors import DataError, UserError, first_line

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

# What samplers of transformers raise for a video that is too short for them, or for a setting that they do not take.
_SAMPLER_ERRORS = (ValueError, TypeError, IndexError, ZeroDivisionError, RuntimeError)


class Frames(NamedTuple):
    """A video as its frames (PIL), and their number per second, if it is known.

    `file` is what transformers' reader says about the file that they come from, with their indices in it.
    """

    frames: tuple[Any, ...]
    fps: float | None = None
    file: dict[str, Any] | None = None

    def metadata(self) -> dict[str, Any]:
        """Return what processors write time stamps from; without a file, the frames are all there are.

        The list of indices is a new one: Qwen3-VL's processor lengthens it.
        """
        if self.file is not None:
            return {**self.file, "frames_indices": list(self.file["frames_indices"])}
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


def require_pyav() -> None:
    if find_spec("av") is None:
        message = "video files need PyAV, which is not installed"
        raise UserError(message, code="package-missing", hint="pip install -e '.[video]'")


def _sampled(video_processor: Any, metadata: VideoMetadata) -> list[int]:
    chosen = video_processor.sample_frames(
        metadata=metadata, fps=video_processor.fps, num_frames=video_processor.num_frames
    )
    return [int(index) for index in chosen]


def _load(path: PictureFile, choose: Callable[[VideoMetadata], Sequence[int]]) -> tuple[np.ndarray, VideoMetadata]:
    """Return the chosen frames of a file (frames, height, width, 3) and its metadata, as transformers reads them.

    Raises `UserError` without PyAV, `ImageError` for a file that is missing, damaged or shorter than it says.
    """
    require_pyav()
    from transformers.video_utils import load_video

    indices: list[int] = []

    def chosen(metadata: VideoMetadata) -> list[int]:
        indices[:] = sorted(set(choose(metadata)))  # GLM-4V may repeat one
        return indices

    try:
        file = opened(path)
        if Path(str(file)).stat().st_size == 0:
            raise _unreadable(path, "the file is empty")
        name: Any = str(file)  # transformers leaves `str` out of its type
        video, metadata = load_video(name, backend="pyav", sample_indices_fn=chosen)
    except UserError:
        raise
    except FileNotFoundError:
        if (problem := url_problem(str(path))) is not None:
            raise ImageError(problem.message, "a URL", code=problem.code, hint=problem.hint) from None
        raise _unreadable(path, "no such file") from None
    except Exception as error:  # PyAV raises errors of many types, as Pillow does
        reason = (
            "it is outside the image folder"
            if isinstance(error, PermissionError)
            else "it is damaged, ends early, or is no video"
        )
        raise _unreadable(path, reason) from None
    if len(video) < len(indices):
        raise _unreadable(path, f"it ends early, before frame {indices[len(video)]} of {metadata.total_num_frames}")
    return video, metadata


def outline(path: PictureFile, video_processor: Any) -> tuple[VideoMetadata, list[int]]:
    """Return the metadata of a file and the indices of the frames that `video_processor` reads. Decodes one frame.

    Raises `ImageError` like `read_video`.
    """
    _, metadata = _load(path, lambda _: [0])
    return metadata, _chosen(path, video_processor, metadata)


def read_video(path: PictureFile, video_processor: Any) -> Frames:
    """Return the frames of a file that `video_processor` (of `sampler`) chooses.

    Raises `ImageError` for a file that is missing, damaged, or too short for the sampler, and `UserError` without PyAV.
    """
    from PIL import Image

    indices: list[int] = []

    def choose(metadata: VideoMetadata) -> list[int]:
        indices[:] = _chosen(path, video_processor, metadata)
        return indices

    video, metadata = _load(path, choose)
    frames = {index: Image.fromarray(frame) for index, frame in zip(sorted(set(indices)), video, strict=True)}
    return Frames(tuple(frames[index] for index in indices), None, {**metadata, "frames_indices": indices})


def require_whole_video(path: PictureFile) -> None:
    """Raise `ImageError` for a video file that is damaged or ends early; it decodes the whole file."""
    _load(path, lambda metadata: [0, max(0, metadata.total_num_frames - 1)])


def _chosen(path: PictureFile, video_processor: Any, metadata: VideoMetadata) -> list[int]:
    why = ""
    try:
        if indices := _sampled(video_processor, metadata):
            return indices
    except _SAMPLER_ERRORS as error:
        why = f": {first_line(error)}"
    raise ImageError(
        f"{type(video_processor).__name__} cannot choose frames of this video, which has "
        f"{metadata.total_num_frames} in {metadata.duration:.2f} seconds{why}",
        where=str(path),
        hint="choose fewer frames, with a smaller num_frames or another fps; a file that does not say its length, such "
        "as .mkv or .webm: ffmpeg -i FILE FILE.mp4",
    )


def _unreadable(path: PictureFile, reason: str) -> ImageError:
    where = re.sub(r"(https?:/[^?]*)\?.*", r"\1", str(path))  # without tokens
    return ImageError(f"cannot read this video: {reason}", reason, code="video-unreadable", where=where)
