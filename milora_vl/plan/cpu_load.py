"""Warn if other programs use the CPU cores that a run trains on."""

from __future__ import annotations

import os

import psutil

SECONDS = 0.3  # length of the measurement


def warnings(device: str, processes: int) -> list[str]:
    """Return a warning if more than half of the CPU is in use, unless the user chose the number of threads.

    OpenMP threads wait for each other by spinning. If they share cores with other programs, a step of seconds may take
    a minute.
    """
    if device != "cpu" or processes > 1 or "OMP_NUM_THREADS" in os.environ:
        return []
    busy = psutil.cpu_percent(SECONDS, percpu=True)
    if psutil.LINUX:  # SLURM and taskset may leave only some cores to a process
        busy = [busy[core] for core in psutil.Process().cpu_affinity() if core < len(busy)]
    taken = sum(busy) / 100
    if taken <= len(busy) / 2:
        return []
    return [
        f"other programs use {taken:.1f} of {len(busy)} cores: training may be very slow "
        "(set OMP_NUM_THREADS=1 before the command to avoid that)"
    ]
