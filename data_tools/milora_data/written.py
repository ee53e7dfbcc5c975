"""The folder that a conversion writes the pictures of a data set to."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import UserError
from .images import StoredPicture, picture_suffix
from .vqa_files import Records


def already_there(path: Path) -> str:
    """Return the message for a file or folder that a conversion would overwrite."""
    return f"{path} exists already\nnothing was written; name a new --output_dir"


class PictureFolder:
    """A folder that is made with the first picture. `num_elsewhere` counts the records that name files elsewhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_mine = False  # it holds what was written here, and nothing else
        self.num_elsewhere = 0
        self._used: Counter[str] = Counter()
        self._names: dict[tuple[str, bytes], str] = {}

    def filled(self, records: Records) -> Records:
        """Yield the records after their stored pictures have been written, each content once by each of its names.

        Raises `UserError` where the folder exists before the first one is.
        """
        for value in records:
            elsewhere = False
            for key in ("image", "images"):
                found = value.get(key)
                for name in found if isinstance(found, list) else [found] if found else []:
                    elsewhere |= not isinstance(name, StoredPicture)
                if isinstance(found, list):
                    value[key] = [self._written(name) for name in found]
                elif found:
                    value[key] = self._written(found)
            self.num_elsewhere += elsewhere
            yield value

    def remove(self) -> None:
        """Remove the folder if it was made here."""
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
            raise UserError(already_there(self.path))
        named = Path(picture.replace("\0", ""))  # a name may be anything: no file system takes NUL, or 256 bytes
        stem, suffix = named.stem[:60] or "picture", named.suffix[:12] or picture_suffix(picture.content)
        name = wanted = f"{stem}{suffix}"
        while name in self._used:
            self._used[wanted] += 1
            name = f"{stem}-{self._used[wanted]}{suffix}"
        self._used[name] = 1
        self.path.mkdir(parents=True, exist_ok=True)
        self.is_mine = True
        (self.path / name).write_bytes(picture.content)
        return name
