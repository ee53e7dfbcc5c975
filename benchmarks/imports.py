"""The time that `import milora_vl` adds to `import torch`, and the time of each --help: medians of fresh processes.

python benchmarks/imports.py [--repeats 7] [--first_step]    prints a JSON line

With --first_step, only the processor time of `milora train` on the model `tiny` until its first step is logged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from milora_vl.__main__ import MENU


def main() -> None:
    """Measure alternately and print the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--first_step", action="store_true")
    chosen = options.parse_args()
    repeats = chosen.repeats
    if chosen.first_step:
        print(json.dumps({"first_step": statistics.median(first_step() for _ in range(3))}))
        return
    torch, both = alternating(["-c", "import torch"], ["-c", "import torch, milora_vl"], repeats)
    helps = {name: seconds(["-m", "milora_vl", name, "--help"]) for name in MENU.modules}
    print(json.dumps({"torch": torch, "torch_and_milora_vl": both, "added": both - torch, "help": helps}))


def alternating(one: list[str], other: list[str], repeats: int) -> tuple[float, float]:
    """Return the median seconds of two commands, run alternately."""
    pairs = [(seconds(one), seconds(other)) for _ in range(repeats)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def seconds(arguments: list[str]) -> float:
    """Return the seconds of one fresh Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_step() -> float:
    """Return the processor seconds of a training, and of the processes it started, until its first step is logged."""
    with tempfile.TemporaryDirectory() as folder:
        turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A fox."}]
        data = Path(folder) / "train.json"
        data.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(16)]))
        flags = f"--model tiny --rank 8 --data_path {data} --output_dir {folder}/run --max_steps 2 --logging_steps 1"
        command = [sys.executable, "-m", "milora_vl", "train", *flags.split(), "--use_cpu", "True"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("step 1/"):
                    times = psutil.Process(process.pid).cpu_times()
                    process.kill()
                    return times.user + times.system + times.children_user + times.children_system
    raise SystemExit("the training ended without a step")


if __name__ == "__main__":
    main()
