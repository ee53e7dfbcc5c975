"""Save the files of an adapter folder atomically: an interrupted save leaves the old files unchanged."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(folder: Path, is_writer: bool = True) -> Iterator[Path]:
    """Yield a temporary folder. Its files move to `folder` at the end, and are removed after an error.

    An existing README.md is copied into it first, because PEFT extends that file. Without `is_writer`, on a rank that
    does not write, yield `folder` itself.
    """
    if not is_writer or folder.is_file():  # if `folder` is a file, PEFT's own check reports it
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
            destination = folder / file.relative_to(partial)
            destination.parent.mkdir(parents=True, exist_ok=True)
            file.replace(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_to_others(folder: Path) -> None:
    """Set default permissions on the weight files of `folder`; safetensors creates them for their owner alone."""
    with tempfile.TemporaryDirectory(dir=folder) as probe:
        (Path(probe) / "new").touch()
        mode = (Path(probe) / "new").stat().st_mode & 0o777
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)
