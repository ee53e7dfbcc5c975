"""The folder to which a conversion writes the pictures of a data set (`--image_folder`): created, filled, removed."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from milora_data.formats.vqa_files import Records
from milora_data.pictures.files import StoredPicture, picture_suffix
from milora_vl.base.errors import UserError


def output_exists(path: Path) -> UserError:
    """Return the error for a file or folder that a conversion would overwrite."""
    return UserError(
        f"{path} exists already", code="output-exists", hint="nothing was written; name a new --output_dir"
    )


class PictureFolder:
    """A folder that is created with the first picture. `num_elsewhere` counts the records that name other files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_mine = False  # created by this conversion
        self.num_elsewhere = 0
        self._used: Counter[str] = Counter()
        self._names: dict[tuple[str, bytes], str] = {}

    def filled(self, records: Records) -> Records:
        """Yield the records after writing their stored pictures; equal names with equal content are written once.

        Raises `UserError` if the folder exists before the first picture is written.
        """
        for value in records:
            elsewhere = False
            for key in ("image", "images"):
                field = value.get(key)
                for name in field if isinstance(field, list) else [field] if field else []:
                    elsewhere |= not isinstance(name, StoredPicture)
                if isinstance(field, list):
                    value[key] = [self._written(name) for name in field]
                elif field:
                    value[key] = self._written(field)
            self.num_elsewhere += elsewhere
            yield value

    def remove(self) -> None:
        """Remove the folder if this conversion created it."""
        if self.is_mine:
            shutil.rmtree(self.path, ignore_errors=True)

    def _written(self, picture: Any) -> Any:
        if not isinstance(picture, StoredPicture):
            return picture
        known = (str(picture), hashlib.blake2b(picture.content, digest_size=16).digest())
        if known not in self._names:
            self._names[known] = self._write(picture)
        return self._names[known]

    def _write(self, picture: StoredPicture) -> str:
        if not self.is_mine and self.path.exists():
            raise output_exists(self.path)
        original = Path(picture.replace("\0", ""))  # file systems allow no NUL and at most 255 bytes
        stem, suffix = original.stem[:60] or "picture", original.suffix[:12] or picture_suffix(picture.content)
        name = wanted = f"{stem}{suffix}"
        while name in self._used:
            self._used[wanted] += 1
            name = f"{stem}-{self._used[wanted]}{suffix}"
        self._used[name] = 1
        self.path.mkdir(parents=True, exist_ok=True)
        self.is_mine = True
        (self.path / name).write_bytes(picture.content)
        return name
