"""Keep two trainings out of one folder. The system releases the lock when the process ends, also after a kill."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from milora_vl.base.errors import UserError

FILE = "_running.lock"  # the hub's upload leaves out names that begin with _
TRIES = 10  # `require_free` of another command holds a lock for a moment


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
        for left in reversed(range(TRIES)):
            number = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = os.pread(number, 200, 0).decode("utf-8", "replace").strip()
                os.close(number)
                if not left:
                    raise in_use(folder, holder) from None
                time.sleep(0.05)
                continue
            except OSError:  # the file system has no locks
                os.close(number)
                file.unlink(missing_ok=True)
                return
            if _is_at(file, number):
                os.ftruncate(number, 0)
                os.pwrite(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                self._held = number, file
                return
            os.close(number)  # its holder has removed it between our open and our lock
        raise in_use(folder, "")

    def release(self) -> None:
        """Remove the lock, if this process holds it. If the disk is lost, the file stays, and blocks no later run."""
        if self._held is not None:
            number, file = self._held
            self._held = None
            with suppress(OSError):
                file.unlink(missing_ok=True)
                os.close(number)


def _is_at(file: Path, number: int) -> bool:
    """Return whether the open file `number` is still the one at this path."""
    try:
        return os.path.samestat(file.stat(), os.fstat(number))
    except FileNotFoundError:
        return False


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
