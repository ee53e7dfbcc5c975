"""Whether other programs use the cores that a run on a CPU is about to train on."""

from __future__ import annotations

import os

import psutil

SECONDS = 0.3  # of looking


def warnings(device: str, processes: int) -> list[str]:
    """What to say of a CPU that is more than half taken; nothing where the user chose the number of threads.

    OpenMP's threads wait for each other, by spinning: where they share cores with others, a step that takes seconds
    may take a minute.
    """
    if device != "cpu" or processes > 1 or "OMP_NUM_THREADS" in os.environ:
        return []
    busy = psutil.cpu_percent(SECONDS, percpu=True)
    if psutil.LINUX:  # where SLURM and taskset leave a process some of the cores
        busy = [busy[core] for core in psutil.Process().cpu_affinity() if core < len(busy)]
    taken = sum(busy) / 100
    if taken <= len(busy) / 2:
        return []
    return [
        f"other programs use {taken:.1f} of {len(busy)} cores: training beside them is slow and may nearly stand still "
        "(OMP_NUM_THREADS=1 in front of the command avoids that)"
    ]
