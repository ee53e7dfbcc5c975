"""Open the pictures and videos of a chat (`--image`, `/image`, `--video`), or say why they cannot be opened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.pictures.files import SUFFIXES, load_image
from milora_data.pictures.videos import Frames, require_one_size, require_pyav
from milora_data.records.record import Video
from milora_vl.common.cli.command_line import beside
from milora_vl.common.cli.web import url_problem
from milora_vl.common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})


def open_picture(path: Path) -> Image.Image:
    """Return the picture in `path`. Raises UserError with similar names if the file is missing."""
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        raise UserError(
            "this is a video; expected a picture", code="video-file", where=str(path), hint=f"use:  --video {path}"
        )
    if path.is_file() or url_problem(path):
        return load_image(path)
    if path.is_dir():
        hint = "name one picture; repeat --image for several. For the frames of a video: --video FOLDER"
        raise UserError("this is a folder; expected a picture", code="image-missing", where=str(path), hint=hint)
    raise UserError("no such picture", code="image-missing", where=str(path), hint=beside(path))


def open_video(place: Path, fps: float | None = None, num_frames: int | None = None) -> Frames | Video:
    """Return a video file, or the pictures of a folder, in the order of their names, as the frames of a video.

    Numbers in names count as numbers: 2.jpg is before 10.jpg. `fps` and `num_frames` choose the frames of a file;
    `fps` says how many frames of a folder are one second. The processor of the model reads the file (`frames`).

    Raises UserError if there is nothing of that name, for a file if PyAV is missing, for a folder if it has no
    pictures, or if their sizes differ.
    """
    if place.is_file():
        require_pyav()
        return Video((), fps, str(place), num_frames)
    if not place.is_dir():
        raise UserError("no such file or folder", code="image-missing", where=str(place), hint=beside(place))
    if num_frames is not None:
        raise UserError(
            "is for a video file; all frames of a folder are shown",
            code="flag-conflict",
            where="--num_frames",
            hint="remove the flag, or name a file with --video",
        )
    files = sorted((path for path in place.iterdir() if path.suffix.lower() in SUFFIXES), key=_by_numbers)
    if not files:
        raise UserError(
            "this folder has no pictures; expected the frames of a video",
            code="image-missing",
            where=str(place),
            hint=f"write them to the folder:  ffmpeg -i VIDEO -vf fps=2 {place}/%04d.jpg",
        )
    return Frames(require_one_size([load_image(path) for path in files], str(place)), fps)


def _by_numbers(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Return the key that sorts names with their numbers as numbers, with any number of digits."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], path.name
