"""Loader processes (`--dataloader_num_workers`) that die or hang: found while a batch is awaited, and nowhere else.

torch raises the error of a killed loader process from a signal handler, wherever the main process happens to be: in a
report that is being written, or inside a library that catches the error or is left with a lock held, and then the
training hangs. Here the waiting itself looks every few seconds whether the processes live.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.data_loader import DataLoaderAdapter
from torch.utils.data import dataloader
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL, signal_handling

TIMEOUT = 1800.0
"""Seconds after which loader processes without a batch count as hung. A slow file system needs seconds, not this."""


def with_timeout(loader: Any) -> Any:
    """Return the loader, which now fails if its processes give no batch for TIMEOUT seconds."""
    inner = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
    if inner.num_workers:
        inner.timeout = TIMEOUT
    return loader


@contextmanager
def found_while_waiting(*, streams: bool = False) -> Iterator[None]:
    """Inside this context, the death of a loader process is an error where the main process waits for a batch.

    `streams`: also for torchdata's loader, which streamed records use.
    """
    iterators: list[Any] = [dataloader._MultiProcessingDataLoaderIter]
    if streams:
        from torchdata.stateful_dataloader import stateful_dataloader

        iterators.append(stateful_dataloader._StatefulMultiProcessingDataLoaderIter)
    waited = weakref.WeakSet[Any]()
    originals = [iterator._try_get_data for iterator in iterators]
    has_handler, handler = signal_handling._SIGCHLD_handler_set, signal.getsignal(signal.SIGCHLD)
    signal_handling._SIGCHLD_handler_set = True  # torch then installs none
    if has_handler:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for iterator, original in zip(iterators, originals, strict=True):
        iterator._try_get_data = _looks_again(original, waited)
    try:
        yield
    finally:
        for iterator, original in zip(iterators, originals, strict=True):
            iterator._try_get_data = original
        signal_handling._SIGCHLD_handler_set = has_handler
        if has_handler:
            signal.signal(signal.SIGCHLD, handler)


def _looks_again(
    try_get_data: Callable[..., tuple[bool, Any]], waited: weakref.WeakSet[Any]
) -> Callable[..., tuple[bool, Any]]:
    """Return torch's method, waiting in parts: after each it checks its processes. With a timeout, it did so once.

    Hung processes are killed: the main process may be receiving a batch from one, which no timeout of a queue covers,
    and at its own end it would wait for them, also for those of the other iterators in `waited` (training, evaluation).
    """

    def wait(self: Any, timeout: float = MP_STATUS_CHECK_INTERVAL) -> tuple[bool, Any]:
        if self._timeout <= 0:
            return try_get_data(self, timeout)
        waited.add(self)
        hung = threading.Event()

        def kill() -> None:
            hung.set()
            for process in [process for iterator in list(waited) for process in iterator._workers]:
                process.kill()

        watchdog = threading.Timer(self._timeout, kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            while True:
                success, batch = try_get_data(self, min(self._timeout, MP_STATUS_CHECK_INTERVAL))
                if success:
                    return success, batch
        except (RuntimeError, OSError, EOFError):
            if hung.is_set():
                raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds") from None
            raise
        finally:
            watchdog.cancel()

    return wait
