"""Open the picture of a chat (`--image`, `/image`), with the errors for a missing or broken one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.command.cli import beside
from milora_data.command.web import url_problem
from milora_data.errors import UserError
from milora_data.images.files import load_image

if TYPE_CHECKING:
    from PIL import Image


def open_picture(path: Path) -> Image.Image:
    """Return the picture in `path`. Raises UserError with similar names if the file is missing."""
    if path.is_file() or url_problem(path):
        return load_image(path)
    if path.is_dir():
        hint = "name one picture; repeat --image for several"
        raise UserError("this is a folder; expected a picture", code="image-missing", where=str(path), hint=hint)
    raise UserError("no such picture", code="image-missing", where=str(path), hint=beside(path))
