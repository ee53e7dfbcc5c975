"""Check the output folder of a command before any work, so that a wrong path costs no time."""

from __future__ import annotations

import os
from pathlib import Path

from milora_vl.base.errors import UserError


def require_folder(path: Path, flag: str = "--output_dir", *, is_written: bool = True) -> None:
    """Raise UserError, at `flag`, if `path` is not a folder that can be written to, or created. Writes nothing.

    With `is_written` False, a folder that can only be read is accepted.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        within = "" if existing == path else f"{path} is inside "
        raise UserError(
            f"{within}{existing}{', which' if within else ''} is a file, not a folder",
            code="path-not-a-folder",
            where=flag,
            hint="use another folder",
        )
    if is_written and not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{existing} is not writable",
            code="path-not-writable",
            where=flag,
            hint="use another folder, or change its permissions",
        )
