"""Watch one reading of hostile input: its exception, its time, its memory, the files it opens, the code it runs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 10  # of CPU time: other programs may be running
WAITING = 120
BYTES = 1 << 30
# Events of the interpreter that a reader of data has no use for.
_FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "pty.spawn")
_WRITING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
_SECRET = "planted-outside"  # a file of this name lies outside of the allowed folders


class Fault(AssertionError):
    """What hostile input must not do."""


class _TooSlow(BaseException):
    """Raised by the alarm; no `except Exception` catches it."""


class _Watch:
    def __init__(self) -> None:
        self.folders: tuple[str, ...] = ()
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.folders:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments[0]!r:.80}")
        elif event == "open":
            path, mode, flags = arguments[0], arguments[1], arguments[2] if len(arguments) > 2 else 0
            writes = bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if isinstance(path, str | bytes | Path) and (writes or _SECRET in os.fsdecode(path)):
                self._require_inside(f"open {mode}", path)
        elif event in _WRITING and isinstance(arguments[0], str | bytes | Path):
            within = event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None)  # a folder of shutil.rmtree
            if not within:
                self._require_inside(event, arguments[0])

    def _require_inside(self, event: str, path: str | bytes | Path) -> None:
        place = os.path.realpath(os.fsdecode(path))
        if place != os.devnull and not place.startswith(self.folders):
            self.seen.append(f"{event} {place}")


_watch: _Watch | None = None  # an audit hook cannot be removed, so there is one


@contextmanager
def guarded(*folders: Path, allowed: tuple[type[Exception], ...]) -> Iterator[None]:
    """Raise `Fault` if the block raises another exception than `allowed`, or if it is slow, large or leaves `folders`.

    Bytecode caches and the files of pytest are not written while it runs.
    """
    global _watch
    _watch = _watch or _Watch()

    def too_slow(_number: int, frame: FrameType | None) -> None:
        raise _TooSlow("".join(traceback.format_stack(frame)[-6:]))

    largest = peak()
    clocks = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITING))
    before = [signal.signal(number, too_slow) for number, _, _ in clocks]
    for _, clock, seconds in clocks:
        signal.setitimer(clock, seconds)
    _watch.seen, _watch.folders = [], tuple(os.path.realpath(folder) for folder in folders)
    try:
        yield
    except allowed as error:
        if not str(error).strip():
            raise Fault(f"{type(error).__name__} without a message") from error
    except _TooSlow as error:
        raise Fault(f"more than {SECONDS} s:\n{error}") from None
    except Exception as error:
        raise Fault(f"{type(error).__name__}: {str(error)[:300]}") from error
    finally:
        for (number, clock, _), handler in zip(clocks, before, strict=True):
            signal.setitimer(clock, 0)
            signal.signal(number, handler)
        _watch.folders = ()
    if _watch.seen:
        raise Fault("; ".join(_watch.seen))
    if peak() - largest > BYTES:
        raise Fault(f"{(peak() - largest) / 2**30:.1f} GiB of memory")


def peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) << 10


def outcome(read: Callable[[], object], *folders: Path, allowed: tuple[type[Exception], ...]) -> str | None:
    """Return the fault of one reading, or None."""
    try:
        with guarded(*folders, allowed=allowed):
            read()
    except Fault as fault:
        return str(fault)
    return None
