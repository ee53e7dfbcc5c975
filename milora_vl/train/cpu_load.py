"""The number of CPU threads of a run: compute on the cores that other programs leave free.

OpenMP threads wait for each other by spinning. If one of them shares its core with another program, all wait for it,
and a step of seconds may take a minute.
"""

from __future__ import annotations

import math
import os
import time
from typing import NamedTuple

import psutil
import torch

SECONDS = 0.3  # length of the first measurement
INTERVAL = 10.0  # seconds between two measurements
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with these, users choose the number of threads


class _Times(NamedTuple):
    """Seconds since some moment in the past: elapsed, used on our cores by all programs, and used by this one."""

    clock: float
    busy: float
    own: float


class FreeCores:
    """Sets the number of torch's threads to the number of free cores, once when it is created and then in `follow`."""

    def __init__(self) -> None:
        """Measure for a moment, and lower the number of threads if other programs use the cores."""
        self.process = psutil.Process()
        self.cores = _own_cores(self.process)
        self.most = self.threads = torch.get_num_threads()
        self.more_before = False  # whether the last measurement allowed more threads
        self.before = self._times()
        time.sleep(SECONDS)
        self.others = self._measure()
        self._set(threads_for(self.others, len(self.cores), self.most))

    def follow(self) -> bool:
        """Measure again if `INTERVAL` has passed, and return whether the number of threads has changed.

        It falls at once, and rises if two measurements in a row allow it.
        """
        if time.monotonic() - self.before.clock < INTERVAL:
            return False
        self.others = self._measure()
        threads = threads_for(self.others, len(self.cores), self.most)
        is_more = threads > self.threads
        changes = threads < self.threads or (is_more and self.more_before)
        self.more_before = is_more and not changes
        if changes:
            self._set(threads)
        return changes

    def describe(self) -> str:
        """Return what the last measurement found."""
        of_threads = f"{self.threads} thread" + ("" if self.threads == 1 else "s")
        return (
            f"other programs use {self.others:.1f} of {len(self.cores)} cores: this run computes with {of_threads} "
            "(OMP_NUM_THREADS=N before the command sets the number)"
        )

    def _set(self, threads: int) -> None:
        if threads != self.threads:
            torch.set_num_threads(threads)
            self.threads = threads

    def _measure(self) -> float:
        """Return the number of cores that other programs have used since the last measurement."""
        now, before = self._times(), self.before
        self.before = now
        used = (now.busy - before.busy) - (now.own - before.own)
        return min(max(0.0, used / (now.clock - before.clock)), float(len(self.cores)))

    def _times(self) -> _Times:
        by_core = psutil.cpu_times(percpu=True)
        busy = sum(sum(by_core[core]) - _idle(by_core[core]) for core in self.cores if core < len(by_core))
        own = 0.0
        for process in (self.process, *self.process.children(recursive=True)):  # loader processes
            try:
                times = process.cpu_times()
            except psutil.Error:  # it has just ended
                continue
            own += times.user + times.system
            if process is self.process:  # children that have ended, such as the loader processes of an epoch
                own += times.children_user + times.children_system
        return _Times(time.monotonic(), busy, own)


def may_choose_threads(device: str, processes: int) -> bool:
    """Return whether the number of threads is ours to choose: one process on a CPU, and the user has set none.

    Torch starts with a thread for each core, or for each physical core; any other number was set by the program.
    """
    if device != "cpu" or processes > 1 or any(name in os.environ for name in VARIABLES):
        return False
    cores = len(_own_cores(psutil.Process()))
    return 1 < torch.get_num_threads() in (cores, min(cores, psutil.cpu_count(logical=False) or cores))


def threads_for(others: float, cores: int, most: int) -> int:
    """Return the best number of threads if other programs use `others` of our cores.

    n threads wait for the slowest one: if others use a share x of one core, they reach n (1 - x), and without that
    core n - 1, which is more if x > 1 / n.

    >>> [threads_for(others, 2, 2) for others in (0.0, 0.4, 0.6, 1.0, 2.0)]
    [2, 2, 1, 1, 1]
    >>> threads_for(1.0, 8, 8), threads_for(3.0, 16, 8)
    (7, 8)
    """
    return min(most, max(1, cores - max(0, math.ceil(others - 1 / cores))))


def _own_cores(process: psutil.Process) -> list[int]:
    """Return the numbers of the cores that we may use: SLURM and taskset may leave only some to a process."""
    return list(process.cpu_affinity()) if psutil.LINUX else list(range(psutil.cpu_count() or 1))


def _idle(times: object) -> float:
    """Return the idle seconds of a core; on Linux also those in which it waited for a disk, and the guests' seconds.

    Linux counts guests among the users' seconds too.
    """
    named = times._asdict()  # type: ignore[attr-defined]
    return sum(named.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
