"""How the benchmarks measure: seconds, memory, and a script in a process of its own (Linux)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
# For glibc: freed memory goes back to the system at once, so that peaks show what is used.
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
Work = Callable[[], Any]
Device = str | torch.device


def now(device: Device = "cpu", *, of_process: bool = False) -> float:
    """Return the time in seconds, after the device has finished its work.

    `of_process`: processor time, which another program on the machine disturbs little. With more than one thread it
    contains waiting.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if of_process else time.perf_counter()


def timed(work: Work, device: Device = "cpu", *, of_process: bool = False) -> tuple[float, Any]:
    """Return the seconds and the result of a call."""
    start = now(device, of_process=of_process)
    result = work()
    return now(device, of_process=of_process) - start, result


@contextmanager
def clocked(into: dict[str, Any], name: str, device: Device = "cpu", *, of_process: bool = False) -> Iterator[None]:
    """Write the seconds of the block into a mapping."""
    start = now(device, of_process=of_process)
    yield
    into[name] = round(now(device, of_process=of_process) - start, 1)


def alternately(
    works: Mapping[str, Work], rounds: int, *, warm_up: int = 0, device: Device = "cpu", of_process: bool = False
) -> dict[str, list[float]]:
    """Return the seconds of every call. The works take turns, so a slow phase of the machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warm_up + rounds):
        for name, work in works.items():
            taken, _ = timed(work, device, of_process=of_process)
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds


def memory(name: str = "VmRSS") -> int:
    """Return the resident memory of this process in bytes; `VmHWM`: its peak since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def saved_for_backward(model: nn.Module, forward: Work) -> int:
    """Return the bytes that autograd keeps for the backward; each storage counts once, weights do not."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # noqa: F841 - its graph lives while the bytes are counted
        return sum(kept.values())


def apart(script: str, *words: object, **environment: str) -> Any:
    """Run a script of this folder in a process of its own; return the JSON of its last line, None if it failed."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
