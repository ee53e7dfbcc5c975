"""Videos: picture files of frames in one size, or a file that transformers' reader decodes with PyAV.

The model's own video processor decides which frames of a file are read (`sample_frames`), as in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from milora_data.pictures.files import ImageError, StoredPicture, opened
from milora_vl.common.cli.web import url_problem
from milora_vl.common.errors import DataError, UserError, first_line

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

DEFAULT_FPS = 2.0  # if the processor has no default; Qwen3-VL and GLM-4V have the same
MOST_PIXELS = 2**29  # of all frames that are read of one file: 1.6 GB, or 259 frames of 1920 x 1080
# What a file may contain, by FFmpeg's names. A list of other files (ffconcat, a playlist) would open these.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,flv,asf,gif"
_DAMAGED = "it is damaged, or it ends early"
# What samplers of transformers raise for a video that is too short for them, or for a setting that they do not take.
_SAMPLER_ERRORS = (ValueError, TypeError, IndexError, ZeroDivisionError, RuntimeError)


class Frames(NamedTuple):
    """A video as its frames (PIL), and their number per second, if it is known.

    `file` is what transformers' reader says about the file that they come from, with their places in it.
    """

    frames: tuple[Any, ...]
    fps: float | None = None
    file: dict[str, Any] | None = None

    def metadata(self) -> dict[str, Any]:
        """Return what processors write time stamps from; without a file, the frames are all there are.

        The list of places is a new one: Qwen3-VL's processor lengthens it.
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
    """Raise `UserError` if PyAV, which reads video files, is not installed."""
    if find_spec("av") is None:
        raise UserError(
            "video files need PyAV, which is not installed",
            code="package-missing",
            hint="pip install -e '.[video]'",
        )


def sampler(video_processor: Any, fps: float | None = None, num_frames: int | None = None) -> Any:
    """Return a video processor that samples `fps` frames per second or `num_frames` frames of each file.

    Without either, its own setting counts, else `DEFAULT_FPS`. Raises `DataError` for a processor that does not sample
    by the setting (GLM-4V knows no `num_frames`).
    """
    if fps is None and num_frames is None:
        if video_processor.fps is not None or video_processor.num_frames is not None:
            return video_processor
        fps = DEFAULT_FPS
    name, value = ("num_frames", num_frames) if fps is None else ("fps", fps)
    assert value is not None
    # The default of the processor for the other setting would overrule this one, or be refused beside it. SmolVLM
    # needs both: it reads `fps` frames per second, and `num_frames` at most.
    for others in ({"fps": None, "num_frames": None}, {}):
        once, twice = (
            _with_settings(video_processor, {**others, name: times * value, "do_sample_frames": True})
            for times in (1, 2)
        )
        try:
            if _num_sampled(once, name, value) < _num_sampled(twice, name, value):
                return once
        except _SAMPLER_ERRORS:
            continue
    raise DataError(
        f"{type(video_processor).__name__} does not choose frames by {name} {value:g}",
        code="video-sampling-unsupported",
        hint=f"use {'num_frames' if name == 'fps' else 'fps'}, or a larger number",
    )


def _with_settings(video_processor: Any, settings: dict[str, Any]) -> Any:
    changed = copy(video_processor)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed


def _num_sampled(video_processor: Any, name: str, value: float) -> int:
    """Return how many frames are sampled of a video that has about ten times as many as `value` asks for."""
    from transformers.video_utils import VideoMetadata

    # Below 300 seconds for `fps`, GLM-4V's limit; long for `num_frames`, which SmolVLM combines with its `fps`.
    total, rate = (100, 10 * value) if name == "fps" else (10 * int(value), 0.1)
    return len(_sampled(video_processor, VideoMetadata(total, rate, duration=total / rate)))


def _sampled(video_processor: Any, metadata: VideoMetadata) -> list[int]:
    """Return the places of the frames that a video processor chooses; it calls its sampler like this."""
    chosen = video_processor.sample_frames(
        metadata=metadata, fps=video_processor.fps, num_frames=video_processor.num_frames
    )
    return [int(index) for index in chosen]


class VideoPlan(NamedTuple):
    """What is read of a video file: its metadata with the places of the frames, and how far frames are turned.

    `rotation` is in degrees counterclockwise; the metadata has the size of the upright frames.
    """

    metadata: VideoMetadata
    rotation: int = 0

    @property
    def indices(self) -> list[int]:
        """The places of the frames in the file, in order; GLM-4V may repeat one."""
        return self.metadata.frames_indices or []


def planned_video(place: str | Path, video_processor: Any) -> VideoPlan:
    """Return which frames of a file `video_processor` (of `sampler`) reads. Decodes the first frame alone.

    Raises `ImageError` for a file that is missing, broken, too short for the sampler or too long, and `UserError`
    without PyAV.
    """
    plan = video_header(place)
    metadata = plan.metadata
    try:
        indices = _sampled(video_processor, metadata)
    except _SAMPLER_ERRORS as error:
        indices, why = [], f": {first_line(error)}"
    else:
        why = ""
    if not indices:
        raise ImageError(
            f"{type(video_processor).__name__} cannot choose frames of this video, which has "
            f"{metadata.total_num_frames} in {metadata.duration:.2f} seconds{why}",
            code="video-too-short",
            where=_shown(place),
            hint="choose fewer frames, with a smaller num_frames or another fps",
        )
    height, width = metadata.height or 0, metadata.width or 0
    if len(indices) * height * width > MOST_PIXELS:
        raise ImageError(
            f"this video is too long: {len(indices):,} frames of {width} x {height} would be read "
            f"({metadata.duration:,.0f} seconds), and {MOST_PIXELS // (height * width):,} of this size are allowed",
            code="video-too-long",
            where=_shown(place),
            hint="read fewer, with num_frames or a smaller fps; cut the video, or make its frames smaller:  "
            "ffmpeg -i VIDEO -vf scale=-2:480 SMALLER.mp4",
        )
    metadata.frames_indices = indices
    return plan


def read_video(place: str | Path, video_processor: Any) -> Frames:
    """Return the frames of a file that `video_processor` (of `sampler`) chooses, upright. Raises like `planned_video`.

    Raises `ImageError` also for a file that ends early.
    """
    import numpy as np
    from PIL import Image
    from transformers.video_utils import read_video_pyav

    plan = planned_video(place, video_processor)
    places = sorted(set(plan.indices))
    try:
        file: Any = opened(place)  # the reader is typed for paths, and PyAV takes the bytes of a file too
        video, _ = read_video_pyav(file, lambda metadata: places)
    except Exception:  # PyAV raises errors of many types, as Pillow does
        raise _unreadable(place, _DAMAGED) from None
    if len(video) < len(places):
        reason = f"it ends early, before frame {places[len(video)]} of {plan.metadata.total_num_frames}"
        raise _unreadable(place, reason)
    upright = np.rot90(video, plan.rotation // 90, axes=(1, 2))
    frames = {index: Image.fromarray(frame) for index, frame in zip(places, upright, strict=True)}
    return Frames(tuple(frames[index] for index in plan.indices), None, dict(plan.metadata))


def require_whole_video(place: str | Path) -> None:
    """Raise `ImageError` for a video file that is broken or ends early. It reads all, and decodes the first frame."""
    expected = video_header(place).metadata.total_num_frames
    try:
        found = _num_packets(place)
    except Exception:  # as in `read_video`
        raise _unreadable(place, _DAMAGED) from None
    if found < expected:
        raise _unreadable(place, f"it ends early, before frame {found} of {expected}")


def _num_packets(place: str | Path) -> int:
    """Return the number of compressed frames in a video file."""
    import av

    with av.open(opened(place), mode="r", options={"format_whitelist": _FORMATS}) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def video_header(place: str | Path) -> VideoPlan:
    """Return what a video file says about itself, without places of frames. Decodes its first frame.

    Raises `ImageError` for a file that is missing or broken, and `UserError` without PyAV.
    """
    require_pyav()
    import av
    from transformers.video_utils import VideoMetadata

    try:
        with av.open(opened(place), mode="r", options={"format_whitelist": _FORMATS}) as container:
            stream = container.streams.video[0]
            first = next(container.decode(stream))
            rate, total = stream.average_rate, stream.frames
            if not rate:
                raise ValueError("it does not say how many frames a second has")
        total = total or _num_packets(place)  # .mkv and .webm do not say it
    except UserError:
        raise
    except Exception as error:  # as in `read_video`
        raise _unreadable(place, error) from None
    turned = first.rotation % 180 != 0
    height, width = (first.width, first.height) if turned else (first.height, first.width)
    metadata = VideoMetadata(
        total, float(rate), duration=total / float(rate), video_backend="pyav", height=height, width=width
    )
    return VideoPlan(metadata, first.rotation)


def _shown(place: str | Path) -> str:
    return re.sub(r"(https?:/[^?]*)\?.*", r"\1", str(place))  # without tokens


def _unreadable(place: str | Path, error: Exception | str) -> ImageError:
    """Return the error for a video file: why it cannot be read, and what to do."""
    if isinstance(error, FileNotFoundError) and (problem := url_problem(place)) is not None:
        return ImageError(problem.message, "a URL", code=problem.code, hint=problem.hint)
    reason = error if isinstance(error, str) else _reason(place, error)
    return ImageError(
        f"cannot read this video: {reason}",
        reason,
        code="video-unreadable",
        where=_shown(place),
        hint="" if isinstance(error, FileNotFoundError | PermissionError) else "copy or download the file again",
    )


def _reason(place: str | Path, error: Exception) -> str:
    """Return why PyAV cannot open a file."""
    import av

    if isinstance(error, FileNotFoundError):
        return "no such file"
    if not isinstance(place, StoredPicture) and Path(place).is_file() and not Path(place).stat().st_size:
        return "the file is empty"
    if isinstance(error, av.error.InvalidDataError | av.error.ArgumentError):
        return "not a video, or in an unusual format"
    if isinstance(error, IndexError | StopIteration | TypeError):
        return "no video is in it"
    return first_line(error)
