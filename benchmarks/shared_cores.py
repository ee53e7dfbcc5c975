"""A training step while other programs use some of the cores: all threads, one thread, and as `milora train` does it.

python benchmarks/shared_cores.py [--busy 1] [--rounds 10]   prints a JSON line

`--busy` endless loops keep as many cores busy; 0 adds none, on a machine that is busy anyway. The three ways take turns
in one process, so the seconds (elapsed, medians) compare. OMP_NUM_THREADS must not be set.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from milora_vl.train.cpu_load import FreeCores, may_choose_threads

ROWS, LENGTH = 4, 96


def main() -> None:
    """Measure the three ways and print their medians."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--busy", type=int, default=1)
    options.add_argument("--rounds", type=int, default=10)
    chosen = options.parse_args()
    if not may_choose_threads("cpu", 1):
        raise SystemExit("unset OMP_NUM_THREADS, and run on two or more cores")
    cores = sorted(os.sched_getaffinity(0))[: chosen.busy]
    loops = [start_loop(core) for core in cores]
    try:
        time.sleep(1)
        print(json.dumps(measure(chosen.rounds) | {"busy": chosen.busy}))
    finally:
        for loop in loops:
            os.kill(loop, signal.SIGKILL)


def start_loop(core: int) -> int:
    """Start a program that uses one core, and return its process number. It is no child: children are not others."""
    command = f"taskset -c {core} {shlex.quote(sys.executable)} -c 'while True: pass' > /dev/null 2>&1 & echo $!"
    return int(subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(rounds: int) -> dict[str, object]:
    """Return the seconds of a step in each way, and the number of threads that was chosen."""
    every, free = torch.get_num_threads(), FreeCores()
    ways = {"all": every, "one": 1, "free": free.threads}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2000, hidden_size=384, intermediate_size=1024, num_hidden_layers=2)
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 2000, (ROWS, LENGTH))
    step(model, ids)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, threads in ways.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            step(model, ids)
            seconds[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "cores": len(free.cores),
        "others": round(free.others, 2),
        "threads": free.threads,
        **{f"{way}_s": round(median, 3) for way, median in medians.items()},
        "free_over_one": round(medians["free"] / medians["one"], 3),
        "all_over_one": round(medians["all"] / medians["one"], 3),
    }


def step(model: nn.Module, ids: Tensor) -> None:
    """Run forward and backward once."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


if __name__ == "__main__":
    main()
