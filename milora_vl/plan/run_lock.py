"""Keep two trainings out of one folder. The system releases the lock when the process ends, also after a kill."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from milora_data.errors import UserError

FILE = "_running.lock"  # the hub's upload leaves out names that begin with _


class RunLock:
    """The lock of a run folder, held by one process until `release`.

    A record lock (`lockf`) belongs to a process: loader processes that outlive a killed training do not hold it.
    """

    def __init__(self) -> None:
        self._held: tuple[int, Path] | None = None

    def take(self, folder: Path) -> None:
        """Lock an existing folder. Raises UserError if another process holds the lock.

        On a file system without locks nothing is locked.
        """
        file = folder / FILE
        number = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(number, 200, 0).decode("utf-8", "replace").strip()
            os.close(number)
            raise in_use(folder, holder) from None
        except OSError:  # the file system has no locks
            os.close(number)
            file.unlink(missing_ok=True)
            return
        os.ftruncate(number, 0)
        os.pwrite(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._held = number, file

    def release(self) -> None:
        """Remove the lock, if this process holds it. If the disk is lost, the file stays, and blocks no later run."""
        if self._held is not None:
            number, file = self._held
            self._held = None
            with suppress(OSError, RuntimeError):  # torch raises the latter at any moment after a loader process died
                file.unlink(missing_ok=True)
                os.close(number)


def require_free(folder: Path) -> None:
    """Raise UserError if a process trains in `folder` now. Nothing is written."""
    try:
        number = os.open(folder / FILE, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(number, fcntl.LOCK_UN)
    except (BlockingIOError, PermissionError):
        raise in_use(folder, os.pread(number, 200, 0).decode("utf-8", "replace").strip()) from None
    except OSError:
        return
    finally:
        os.close(number)


def in_use(folder: Path, holder: str) -> UserError:
    """Return the error for a folder in which `holder` trains."""
    return UserError(
        f"another training runs in this folder ({holder or 'unknown process'})",
        code="run-in-use",
        where=str(folder),
        hint="wait for its end, or stop it, then:  --resume_from_checkpoint auto\nor use another --output_dir",
    )
