"""Open the pictures and videos of a chat (`--image`, `/image`, `--video`), or say why they cannot be opened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.pictures.files import SUFFIXES, load_image
from milora_data.pictures.videos import Frames, require_one_size
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import beside
from milora_vl.cli.web import url_problem

if TYPE_CHECKING:
    from PIL import Image

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})


def open_picture(path: Path) -> Image.Image:
    """Return the picture in `path`. Raises UserError with similar names if the file is missing."""
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        raise _video_file(path)
    if path.is_file() or url_problem(path):
        return load_image(path)
    if path.is_dir():
        hint = "name one picture; repeat --image for several. For the frames of a video: --video FOLDER"
        raise UserError("this is a folder; expected a picture", code="image-missing", where=str(path), hint=hint)
    raise UserError("no such picture", code="image-missing", where=str(path), hint=beside(path))


def open_video(folder: Path, fps: float | None) -> Frames:
    """Return the pictures of a folder, in the order of their names, as the frames of a video.

    Numbers in names count as numbers: 2.jpg is before 10.jpg.

    Raises UserError if there is no such folder, if it has no pictures, or if their sizes differ.
    """
    if folder.is_file():
        raise _video_file(folder)
    if not folder.is_dir():
        raise UserError("no such folder", code="image-missing", where=str(folder), hint=beside(folder))
    files = sorted((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES), key=_by_numbers)
    if not files:
        raise UserError(
            "this folder has no pictures; expected the frames of a video",
            code="image-missing",
            where=str(folder),
            hint=_FRAMES.format("VIDEO", folder),
        )
    return Frames(require_one_size([load_image(path) for path in files], str(folder)), fps)


def _by_numbers(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Return the key that sorts names with their numbers as numbers, whatever the number of digits."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], path.name


_FRAMES = "write its frames to a folder:  ffmpeg -i {} -vf fps=2 {}/%04d.jpg"


def _video_file(path: Path) -> UserError:
    hint = _FRAMES.format(path, path.stem) + f"\nthen (after mkdir {path.stem}):  --video {path.stem} --fps 2"
    return UserError("a video is a folder of its frames, got a file", code="video-file", where=str(path), hint=hint)
