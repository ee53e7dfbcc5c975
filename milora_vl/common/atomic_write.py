"""Write files and folders atomically: a killed process leaves the old content or the new one, never a part."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from milora_vl.common.errors import UserError
from milora_vl.common.secrets import without_secrets


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield an empty temporary file beside `file`, for any writer; it replaces `file` when the block ends.

    Several processes may write the same file: each has its own temporary file, and the last one wins. After an error
    the old file is unchanged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid4().hex}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only the owner can read
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)  # remains after an error, for example on a full disk


def write_text(file: Path, text: str, *, hides_secrets: bool = False) -> Path:
    """Write a text file atomically and create its folder.

    `hides_secrets` is for files that people share and no program reads back, such as reports.
    """
    with atomic_file(file) as partial:
        partial.write_text(without_secrets(text) if hides_secrets else text, encoding="utf-8", newline="\n")
    return file


def write_json(file: Path, content: Any, *, hides_secrets: bool = False) -> Path:
    """Write a value as JSON atomically; values that JSON does not support are written as `str(value)`."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
    return write_text(file, text, hides_secrets=hides_secrets)


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file; None if there is no file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines, none without a file; skip a line that a kill has truncated."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:  # bytes end at a newline alone; texts may hold other line ends
            try:
                value = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a new folder to write; it is renamed to `folder` when the block ends. Its parent is temporary.

    `folder` may exist if it is empty. If another process has written it meanwhile, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        staged = Path(scratch) / "staged"
        staged.mkdir()
        yield staged
        _open_to_others(staged)
        try:
            staged.rename(folder)
        except OSError:
            if not all((folder / file.name).exists() for file in staged.iterdir()):
                raise


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
        _open_to_others(partial)
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            destination = folder / file.relative_to(partial)
            destination.parent.mkdir(parents=True, exist_ok=True)
            file.replace(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Set default permissions on the weight files of `folder`; safetensors creates them for their owner alone."""
    probe = folder / f".{uuid4().hex}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


RESUME = "wait for its end, or stop it, then:  --resume_from_checkpoint auto"
WAIT = 8  # seconds for the lock: loader processes of a killed training notice its end, and leave, within five


@contextmanager
def locked(path: Path, what: str = "training", hint: str = RESUME) -> Iterator[None]:
    """Hold the lock of a folder for a training, a sweep or a study (`what`). Raises UserError if another process does.

    The system releases it when the process and its loader processes end, also after a kill.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        for remaining in range(WAIT, -1, -1):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not remaining:
                    message = f"another {what} runs in this folder"
                    raise UserError(message, code="run-in-use", where=str(path), hint=hint) from None
                time.sleep(1)
        yield
    finally:
        os.close(handle)


@contextmanager
def created(path: Path) -> Iterator[None]:
    """Create the folder of a run, and lock it; empty folders of a run that has not begun go again."""
    absent = [folder for folder in (path, *path.parents) if not folder.exists()]  # innermost first
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot create {path}: {error.strerror}"
        raise UserError(message, where="--output_dir") from None
    try:
        with locked(path):
            yield
    finally:
        for folder in absent:
            try:
                folder.rmdir()
            except OSError:  # not empty
                break
