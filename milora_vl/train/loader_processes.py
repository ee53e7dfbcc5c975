"""Loader processes (`--dataloader_num_workers`) that die or hang: found while a batch is awaited, and nowhere else.

torch raises the error of a killed loader process from a signal handler, wherever the main process happens to be: in a
report that is being written, or inside a library that catches the error or is left with a lock held, and then the
training hangs. Here the waiting itself looks every few seconds whether the processes live.

Schedulers and torchrun send SIGTERM to all processes of a job. torch's loader processes die of it at once, but the main
process needs their batches to end its step and save it. Here they ignore SIGTERM until the training has ended.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import queues
from typing import Any

from accelerate.data_loader import DataLoaderAdapter
from torch.utils.data import dataloader
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL, signal_handling

from milora_vl.base.errors import first_line

GONE = (ConnectionError, EOFError)  # while the main process receives a batch
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
    has_ended = mmap.mmap(-1, 1)  # the loader processes see it too
    originals = [iterator._try_get_data for iterator in iterators]
    has_handler, handler = signal_handling._SIGCHLD_handler_set, signal.getsignal(signal.SIGCHLD)
    set_worker_handlers = signal_handling._set_worker_signal_handlers

    def set_handlers() -> None:
        set_worker_handlers()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if has_ended[0] else None)
        queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]

    signal_handling._SIGCHLD_handler_set = True  # torch then installs none
    signal_handling._set_worker_signal_handlers = set_handlers
    if has_handler:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for iterator, original in zip(iterators, originals, strict=True):
        iterator._try_get_data = _looks_again(original, waited)
    try:
        yield
    finally:
        for iterator, original in zip(iterators, originals, strict=True):
            iterator._try_get_data = original
        has_ended[0] = 1
        for used in list(waited):
            used._shutdown_workers()
        _kill(waited)  # a hung one is still there
        signal_handling._set_worker_signal_handlers = set_worker_handlers
        signal_handling._SIGCHLD_handler_set = has_handler
        if has_handler:
            signal.signal(signal.SIGCHLD, handler)


def _cannot_send(error: Exception, _: object) -> None:
    sys.stderr.write(f"error: a loader process cannot send its batch: {first_line(error)}\n")
    sys.stderr.flush()
    os._exit(1)


def _kill(iterators: weakref.WeakSet[Any]) -> None:
    for process in [process for iterator in list(iterators) for process in iterator._workers]:
        process.kill()


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
        received, hung = threading.Event(), threading.Event()

        def watch() -> None:
            """Count intervals, not time: after a stop of the whole job (SIGSTOP) the processes have to start again."""
            intervals = math.ceil(self._timeout / MP_STATUS_CHECK_INTERVAL)
            if not any(received.wait(self._timeout / intervals) for _ in range(intervals)):
                hung.set()
                _kill(waited)

        threading.Thread(target=watch, daemon=True).start()
        try:
            while True:
                success, batch = try_get_data(self, min(self._timeout, MP_STATUS_CHECK_INTERVAL))
                if success:
                    return success, batch
        except (RuntimeError, OSError, EOFError) as error:
            if hung.is_set():
                raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds") from None
            if isinstance(error, GONE):
                raise RuntimeError("DataLoader worker exited unexpectedly while it sent a batch") from None
            raise
        finally:
            received.set()

    return wait
