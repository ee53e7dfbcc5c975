"""Write a folder's files whole: an interrupted save leaves the files of before, never half of one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(folder: Path, is_writer: bool = True) -> Iterator[Path]:
    """Give a folder to write into; its files move to `folder` when all are written, and vanish after an error.

    A README.md that is there is given too, as PEFT adds to it. Without `is_writer` (another rank writes) the folder
    itself is given.
    """
    if not is_writer or folder.is_file():  # PEFT says what is wrong with a file
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        if (folder / "README.md").is_file():
            shutil.copyfile(folder / "README.md", partial / "README.md")
        yield partial
        open_to_others(partial)
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            place = folder / file.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_to_others(folder: Path) -> None:
    """Give the files of `folder` the permissions of any new file: safetensors' are for their owner alone."""
    with tempfile.TemporaryDirectory(dir=folder) as probe:
        (Path(probe) / "new").touch()
        mode = (Path(probe) / "new").stat().st_mode & 0o777
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)
